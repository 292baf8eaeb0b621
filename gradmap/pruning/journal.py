"""What a run has decided so far, on disk after every decision, so that a crash costs one step at
most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.files import remove_file, write_json
from gradmap.common.processes import is_main_process
from gradmap.common.reading import read_json_object
from gradmap.methods.selection import Step

_STEPS = TypeAdapter(list[Step])


def may_go_on(path: Path, stored: dict[str, Any] | None, key: dict[str, Any], insist: bool) -> bool:
    """Whether what an interrupted run left at `path` is of the same inputs; says so if they are
    others.

    stored: the key that it was written with, None if there is nothing whole. Raises UserError where
    it is not, and the user insists.
    """
    if stored is None:
        if insist:
            raise UserError(f"There is nothing to resume: no whole {path}; leave out --resume.")
        return False
    changed = [name for name in key if stored.get(name) != key[name]]
    if changed and insist:
        raise UserError(
            f"Cannot resume: {', '.join(changed)} changed since {path} was written; start over "
            "with --fresh."
        )
    if changed:
        say(f"Starting over: {', '.join(changed)} changed since {path} was written")
    return not changed


@dataclass(frozen=True)
class _Stored:
    key: dict[str, Any]
    steps: list[Step]


@dataclass(frozen=True)
class Journal:
    """A JSON file beside the output directory. key: what the decisions depend on, as name -> hash
    or setting."""

    path: Path
    key: dict[str, Any]

    @classmethod
    def beside(cls, out: Path, key: dict[str, Any]) -> Journal:
        return cls(out.with_name(f".{out.name}.journal.json"), key)

    @classmethod
    def recorded(cls, out: Path, inputs: dict[str, Any], name: str) -> Any:
        """What the journal beside `out` has under `name` in its key, if its run had these inputs;
        else None."""
        stored = cls.beside(out, {})._read()
        return stored.key.get(name) if stored and inputs.items() <= stored.key.items() else None

    def open(self, resume: bool | None) -> list[Step]:
        """Returns the decisions to go on from.

        resume: True requires a journal of the same inputs, False ignores one, None takes one of the
        same inputs. Raises UserError if there is none to resume, or if its inputs were others.
        """
        if resume is False:
            return []
        stored = self._read()
        known = None if stored is None else stored.key
        if not may_go_on(self.path, known, self.key, insist=bool(resume)):
            return []
        assert stored is not None, "what is not there cannot be gone on with"
        say(f"Going on after {len(stored.steps)} decisions of an interrupted run ({self.path})")
        return stored.steps

    def _read(self) -> _Stored | None:
        """None if there is none, or a damaged one."""
        if not self.path.exists():
            return None
        try:
            stored = read_json_object(self.path)
            return _Stored(dict(stored["key"]), _STEPS.validate_python(stored["steps"]))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            say(f"Starting over: {self.path} is damaged")
            return None

    def write(self, steps: list[Step]) -> None:
        """Atomic and fsynced: after a crash the file holds these decisions or the ones before."""
        if is_main_process():
            decided = _STEPS.dump_python(steps, mode="json")
            write_json(self.path, {"key": self.key, "steps": decided})

    def remove(self) -> None:
        remove_file(self.path)
