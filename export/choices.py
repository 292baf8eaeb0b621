"""What of the options of `gradmap export` a model and this machine allow."""

from __future__ import annotations

from typing import Any

from export.formats import FORMATS
from export.formats.format import Format, Runner
from export.options import ExportOptions
from export.twin import rope_types
from export.writers import Storage
from gradmap.common.errors import UserError
from gradmap.common.wording import listed


def choose_storage(name: str, options: ExportOptions, config: dict[str, Any]) -> Storage:
    """Settles how a format stores the weights of a model; raises UserError if it cannot store them
    so, or not here."""
    if name not in FORMATS:
        raise UserError(f"Unknown format {name!r}; known are {', '.join(FORMATS)}.")
    form = FORMATS[name]
    dtype = options.dtype or form.default_dtype
    if dtype not in form.dtypes:
        raise UserError(
            f"Format {name} cannot store dtype {dtype!r}; it can store {', '.join(form.dtypes)}."
        )
    if options.quantise is not None and options.quantise not in form.quantisations:
        known = ", ".join(form.quantisations) or "none"
        raise UserError(f"Format {name} has no quantisation {options.quantise!r}; it has: {known}.")
    _require_rope(form, rope_types(config))
    runners = runners_of(form, options.check_vllm)
    form.require(config, options.quantise, runners)
    for runner in runners:
        if runner.package is not None:
            form.require_package(runner.package)
    return Storage(dtype, options.quantise, options.shard_bytes)


def runners_of(form: Format, check_vllm: bool) -> list[Runner]:
    """Those that have to reproduce the reference here, the format's first one foremost."""

    def asked(runner: Runner) -> bool:
        return not runner.optional or (check_vllm and runner.installed)

    return list(filter(asked, form.runners))


def _require_rope(form: Format, kinds: set[str]) -> None:
    for kind in sorted(kinds & set(form.unfit_ropes)):
        fit = [other.name for other in FORMATS.values() if kind not in other.unfit_ropes]
        raise UserError(
            f"Format {form.name} cannot express a rope of type {kind}, whose frequencies follow "
            f"the length of the text; use format {listed(fit, 'or')}."
        )
