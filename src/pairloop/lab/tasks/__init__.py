"""The tasks of the lab by name."""

from __future__ import annotations

from pairloop.lab.tasks.addition import Addition
from pairloop.lab.tasks.base import Task
from pairloop.lab.tasks.brackets import Brackets
from pairloop.lab.tasks.caesar import Caesar
from pairloop.lab.tasks.cipher import Cipher
from pairloop.lab.tasks.countdown import Countdown
from pairloop.lab.tasks.larger import Larger
from pairloop.lab.tasks.reverse import Reverse
from pairloop.lab.tasks.service import Service
from pairloop.lab.tasks.sort import Sort
from pairloop.lab.tasks.style import Style
from pairloop.lab.tasks.support import Support

_ALL: tuple[Task, ...] = (
    Sort(), Addition(), Brackets(), Countdown(), Caesar(), Reverse(), Style(), Cipher(), Larger(), Service(), Support(),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
