"""Many demos, one after another: ``python -m pairloop.demo.seeds --seeds 0-19 --rounds 2 --noise 1.0 --out DIR``.

For questions that one seed cannot answer, such as how often the gate promotes a challenger that learned from coin tosses.
No seed is left out; each run's document stays in its folder, and a run whose folder is whole is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pairloop.demo.report import JSON_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", required=True, help="first-last, both included")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--customers", type=int, default=512)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    first, last = (int(part) for part in options.seeds.split("-"))
    documents = []
    for seed in range(first, last + 1):
        documents.append(_demo(options.out / f"seed-{seed}", seed, options))
        print(_line(seed, documents[-1]), flush=True)
    duels = [round_ for document in documents for round_ in document["rounds"] if round_["duel_picks"] > 0]
    promotions = sum(round_["verdict"] == "PROMOTE" for round_ in duels)
    print(json.dumps({"demos": len(documents), "duels": len(duels), "promotions": promotions}))


def _demo(out: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    if not (out / JSON_FILE).exists():
        command = [sys.executable, "-m", "pairloop", "demo", "--json", "--out", str(out), "--seed", str(seed)]
        for name in ("rounds", "customers", "noise"):
            command += [f"--{name}", str(getattr(options, name))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # what goes wrong stays visible on stderr
    document: dict[str, Any] = json.loads((out / JSON_FILE).read_text(encoding="utf-8"))
    return document


def _line(seed: int, document: dict[str, Any]) -> str:
    final = document["final"]
    verdicts = " ".join(f"{r['verdict']}({r['duel_picks']} picks, E {r['e_value']:.3g})" for r in document["rounds"])
    return (
        f"seed {seed}: final {final['win_rate']:.3f} [{final['ci95'][0]:.3f}, {final['ci95'][1]:.3f}], utility "
        f"{final['utility']:.2f}, fidelity {final['fidelity']:.3f} (base {document['base']['fidelity']:.3f}), "
        f"{document['wall_s']:.0f} s wall, {document['cpu_s']:.0f} s CPU: {verdicts}"
    )


if __name__ == "__main__":
    main()
