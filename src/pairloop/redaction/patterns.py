"""The patterns: what looks like personal data or a secret, found by its form and, where it has one, by its checksum.

Each finder yields spans of a text. They are tried in this order, and what one has taken the next ones do not see: a card number
is no phone number, an address inside of a link with a password is part of the credentials. All are linear in the text: every
repetition is bounded.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

OUR_ID = re.compile(
    r"(?<![A-Za-z0-9])(?!sk[-_])[A-Za-z]{2,24}[-_]"
    r"(?:[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}|[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})"
    r"(?![A-Za-z0-9])"
)
"""An id that a store has drawn (``store.ids``): one in some ten thousand holds what could be an account or a card."""

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY-----[A-Za-z0-9+/=\s]{1,8000}(?:-----END [A-Z ]{0,24}PRIVATE KEY-----)?"
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:\[\]]{1,256}:[^\s/@]{1,256}(?=@\S)")
_SECRET = re.compile(
    r"(?i)\b(?:api[_-]?key|(?:access|auth|refresh|session)[_-]?token|client[_-]?secret|secret|password|passwd|pwd)"
    r"[\"']?\s{0,3}(?:[=:]|\bis\b)\s{0,3}[\"']?(?=[^\s\"',;&]{0,64}\d)(?P<value>[^\s\"',;&\[\]]{6,256})"
)
_API_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-[A-Za-z0-9_-]{16,256}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,99}"  # OpenAI, Anthropic, our own; Stripe
    r"|gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,99}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,999}"  # Amazon, Google
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,255}|hf_[A-Za-z0-9]{30,99}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,999}"
    r"|SG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,64}|eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]{8,4096}"
    r")(?![A-Za-z0-9_-])"
)
_KEY_MARKS = (
    "sk-", "_live_", "_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AKIA", "ASIA", "AIza", "ya29.",
    "xox", "hf_", "npm_", "pypi-", "SG.", "eyJ",
)  # fmt: skip
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]++@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
# Those of digits begin with what a search can skip to, and look behind it from there: a text without digits costs little.
_IBAN = re.compile(r"\d\d(?<=(?<![A-Za-z0-9])[A-Za-z]{2}\d\d)(?=(?P<rest>(?:[ -]?[A-Za-z0-9]){11,30}))")
_CARD = re.compile(r"[2-6](?<![\w.+].)(?<!\d-.)(?=(?P<rest>\d{3}[ -]?\d{4,6}[ -]?\d{4,5}[ -]?\d{0,4}[ -]?\d{0,3}))")
_CARD_NUMBERS = re.compile(
    r"3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|(?:4|5[1-5]|2[2-7]|35|6\d)\d{14,15}|(?:50|5[6-9]|6\d)\d{15,16}|(?:4|6)\d{18}"
)
_IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])")

_SEPARATED = r"[ .\-/\u00a0\u2010\u2011]"
_AREA, _NUMBER = r"[2-9]\d{2}", r"[2-9]\d{2}[-. ]\d{4}"
_GROUPS = rf"\(?\d{{1,4}}\)?(?:{_SEPARATED}{{0,2}}\(?\d{{1,5}}\)?){{2,7}}"
_PHONE = re.compile(
    r"[+(\d](?:"
    # international: +49 171 2345678, 0049-171-2345678, +1 (415) 555-2671
    rf"(?<=\+)(?<![\w+].){_GROUPS}|(?<=0)(?<![\w+./-].)0(?=[1-9]){_GROUPS}"
    # North America: (415) 555-2671, 415-555-2671, 1-415-555-2671
    rf"|(?<=\()(?<![\w+./-].){_AREA}\) ?{_NUMBER}|(?<=[2-9])(?<![\w+./-].)\d{{2}}[-.]{_NUMBER}"
    rf"|(?<=1)(?<![\w+./-].)[ .-](?:\({_AREA}\) ?|{_AREA}[-.]){_NUMBER}"
    # national with the trunk zero, in groups: 0171 2345678, 030/123 45 67, (020) 7946 0958, 01 23 45 67 89
    rf"|(?:(?<=0)|(?<=\()0)(?<![\w+./-]0)(?<![\w+./-]\(0)[1-9]\d{{0,3}}\)?(?:{_SEPARATED}{{1,2}}\d{{2,8}}){{1,4}}"
    r")(?![\w]|[-./:]\d)"
)
_DATE = re.compile(
    r"(?:0[1-9]|[12]\d|3[01])[-./](?:0[1-9]|1[0-2])[-./](?:19|20)?\d{2}(?!\d)|(?:0[1-9]|1[0-2])[-./](?:19|20)\d{2}(?!\d)"
)
_NAMED_PHONE = re.compile(
    r"(?i)\b(?:phone|tele(?:ph|f)on\w{0,4}|tel|mobile|mobil|cell|handy|fax|whatsapp|call me (?:at|on)|reach me (?:at|on)|"
    r"text me (?:at|on))\b\.?"
    # only what introduces its number may stand between: in "for your phone, order 20261127" the number is another one
    r"(?:[^\S\n]{0,4}(?:numbers?|nr\.?|no\.?|nummer|is|ist|lautet|[:=#)\"'-])){0,4}[^\S\n]{0,4}"
    r"(?<!\w)(?P<value>\+?\(?\d(?:[ .\-/()]{0,2}\d){6,14})(?!\w)"
)
_PHONE_WORDS = ("phone", "tel", "mobil", "cell", "handy", "fax", "whatsapp", "me at", "me on")
_ISO_DATE = re.compile(r"(?:19|20)\d{2}[-./](?:0[1-9]|1[0-2])[-./](?:0[1-9]|[12]\d|3[01])(?!\d)")

_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK",
        "21": "CH HR LI LV", "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB PL SV", "29": "BR EG PS QA UA", "30": "JO KW MU", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip


def _all(pattern: re.Pattern[str], *needs: str) -> Finder:
    """Every match; of those with a group ``value``, that part. ``needs``: a text with none of these has no match, which is
    much quicker to find out (in small letters, where the pattern takes either)."""
    folds = bool(pattern.flags & re.IGNORECASE)

    def find(text: str) -> Iterator[Span]:
        searched = text.lower() if folds else text
        if any(word in searched for word in needs):
            for match in pattern.finditer(text):
                yield match.span("value" if "value" in pattern.groupindex else 0)

    return find


def _ibans(text: str) -> Iterator[Span]:
    """By country, length and checksum (ISO 13616)."""
    for match in _IBAN.finditer(text):
        start = match.start() - 2
        found = text[start : match.end("rest")]
        wanted = _IBAN_LENGTHS.get(found[:2].upper())
        places = [place for place, character in enumerate(found) if character.isalnum()]
        if wanted is None or len(places) < wanted:
            continue
        end = start + places[wanted - 1] + 1
        number = "".join(found[place] for place in places[:wanted]).upper()
        is_whole = not text[end : end + 1].isalnum()
        if is_whole and int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1:
            yield start, end


def _cards(text: str) -> Iterator[Span]:
    """By the first digit, the length and the Luhn sum; another number may stand before or behind it."""
    last = 0
    for match in _CARD.finditer(text):
        start = match.start()
        found = text[start : match.end("rest")]
        places = [place for place, character in enumerate(found) if character.isdigit()]
        for n in range(14, min(len(places), 19) + 1):
            end, number = start + places[n - 1] + 1, "".join(found[place] for place in places[:n])
            is_whole = not (text[end : end + 1].isalnum() or text[end : end + 1] == "_")
            if start >= last and is_whole and _CARD_NUMBERS.fullmatch(number) and _luhn([int(digit) for digit in number]):
                yield start, end
                last = end


def _luhn(digits: list[int]) -> bool:
    doubled = (digit * 2 - 9 * (digit > 4) if place % 2 else digit for place, digit in enumerate(reversed(digits)))
    return sum(doubled) % 10 == 0


def _phones(text: str) -> Iterator[Span]:
    """Numbers that are written as such: with a country code, in groups, or behind a word for it. A bare number is none."""
    for match in _PHONE.finditer(text):
        digits, is_national = sum(character.isdigit() for character in match[0]), match[0].lstrip("(")[0] == "0"
        if (9 if is_national else 8) <= digits <= 15 and not _DATE.match(match[0]):
            yield match.span()


def _named_phones(text: str) -> Iterator[Span]:
    """A bare number behind a word for a phone, which is no date."""
    folded = text.lower()
    if any(word in folded for word in _PHONE_WORDS):
        for match in _NAMED_PHONE.finditer(text):
            if not (_DATE.match(match["value"]) or _ISO_DATE.match(match["value"])):
                yield match.span("value")


def _addresses_v4(text: str) -> Iterator[Span]:
    """All that are addresses, but for those that name nobody: loopback and 0.0.0.0."""
    for match in _IPV4.finditer(text):
        if _is_somebodys(match[0]):
            yield match.span()


def _addresses_v6(text: str) -> Iterator[Span]:
    """A time of day and ``std::list`` have the form of the beginning of one, and are none."""
    if text.count(":") < 2:
        return
    for match in _IPV6.finditer(text):
        found = match[0].rstrip(":") if match[0].endswith(":") and not match[0].endswith("::") else match[0]
        first = found.partition(":")[0]
        if (
            (len(first) >= 2 or found.count(":") == 7)
            and any(character.isdigit() for character in found)
            and _is_somebodys(found)
        ):
            yield match.start(), match.start() + len(found)


def _is_somebodys(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


FINDERS: tuple[tuple[str, Finder], ...] = (
    ("PRIVATE_KEY", _all(_PRIVATE_KEY, "PRIVATE KEY")),
    ("CREDENTIALS", _all(_CREDENTIALS, "://")),
    ("API_KEY", _all(_API_KEY, *_KEY_MARKS)),
    ("SECRET", _all(_SECRET, "key", "token", "secret", "passw", "pwd")),
    ("EMAIL", _all(_EMAIL, "@")),
    ("IBAN", _ibans),
    ("CREDIT_CARD", _cards),
    ("IP_ADDRESS", _addresses_v6),
    ("IP_ADDRESS", _addresses_v4),
    ("PHONE", _phones),
    ("PHONE", _named_phones),
)
"""Placeholder and what finds it, in the order in which they are tried."""
