"""What the help of `gradmap export` says of the formats."""

from __future__ import annotations

from itertools import chain, groupby

from export.formats import FORMATS
from export.formats.format import QUANTISATIONS
from gradmap.common.wording import listed


def format_help() -> str:
    """The help of --format: all that there are."""
    return f"{listed(list(FORMATS), 'or')}; may be given several times."


def dtype_help() -> str:
    """The help of --dtype: all that some format can store, and the default of each."""
    known = list(dict.fromkeys(chain.from_iterable(form.dtypes for form in FORMATS.values())))
    by_default = sorted(FORMATS.values(), key=lambda form: known.index(form.default_dtype))
    defaults = [
        f"{dtype} for {' and '.join(form.name for form in forms)}"
        for dtype, forms in groupby(by_default, key=lambda form: form.default_dtype)
    ]
    return f"{listed(known, 'or')}; by default {', '.join(defaults)}."


def quantise_help() -> str:
    """The help of --quantise: every kind, and the formats that have it."""
    described = []
    for kind, stored in QUANTISATIONS.items():
        having = [form.name for form in FORMATS.values() if kind in form.quantisations]
        described.append(f"{kind}: the layers' weights as {stored} ({', '.join(having)}).")
    return " ".join(described)
