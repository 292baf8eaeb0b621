"""Which models are evaluated, and where they run: a checkpoint, a checkpoint under a plan, an
artifact, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file
from gradmap.common.finite import require_finite_weights
from gradmap.common.reading import read_json_object
from gradmap.evaluation.backends import Backend
from gradmap.model.checkpoint import Checkpoint, is_quantised, open_checkpoint
from gradmap.model.ends import end_tokens
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, resolve_device, resolve_dtype
from gradmap.model.model_sizes import read_sizes
from gradmap.model.precision import count_parameters
from gradmap.pruning.plan import load_changes, load_plan, require_same_model
from gradmap.pruning.plan_tensors import CORRECTIONS_FILE
from gradmap.runtimes.onnx_session import ONNX_FILE
from gradmap.runtimes.vllm_environment import vllm_dtype

BACKENDS = ("auto", "transformers", "vllm", "onnxruntime", "endpoint")


@dataclass(frozen=True)
class Opened:
    """A model that runs. dtype: what it computes in. All but the backend: None where it cannot be
    seen from outside."""

    backend: Backend
    layers: int | None
    parameters: int | None
    dtype: str | None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate. identity: what its scores depend on; None if that is not known. open:
    runs it for a while.

    tokenizer: the directory that has it, if the model does.
    """

    name: str
    identity: dict[str, Any] | None
    tokenizer: Path | None
    open: Callable[[], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class Where:
    """Where a model runs. backend: one of BACKENDS; dtype and device as for
    `gradmap.model.loading.load_model`."""

    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"


def find_models(
    model: str,
    gguf_file: str | None,
    allow_pickle: bool,
    plan: Path | None,
    pruned: str | None,
    where: Where,
) -> list[EvaluatedModel]:
    """The dense model and, with a plan or a pruned model, that too.

    Raises UserError if something is missing or of another kind, or the plan belongs to another
    model.
    """
    if where.backend not in BACKENDS:
        raise UserError(f"Unknown backend {where.backend!r}; use {', '.join(BACKENDS)}.")
    if plan is None:
        found = [_find_model(model, gguf_file, allow_pickle, where)]
        return found if pruned is None else [*found, _find_model(pruned, None, allow_pickle, where)]
    if pruned is not None:
        raise UserError("--plan and --pruned both say what the pruned model is; give one of them.")
    if where.backend not in ("auto", "transformers"):
        raise UserError(
            f"A plan is applied in transformers, not in {where.backend}; export it, and give "
            "--pruned DIR."
        )
    return checkpoint_models(open_checkpoint(model, gguf_file, allow_pickle), plan, where)


def checkpoint_models(
    checkpoint: Checkpoint, plan: Path | None, where: Where
) -> list[EvaluatedModel]:
    """The checkpoint in transformers and, with a plan, the pruned model in memory (W' unfolded);
    loaded once."""
    device = resolve_device(where.device)
    dtype = resolve_dtype(where.dtype, device, checkpoint)

    @cache
    def loaded() -> Any:
        model = load_model(checkpoint, dtype, device)
        require_finite_weights(model.named_parameters())
        return model

    identity = _identity(
        "transformers", checkpoint.file_hashes, Where("transformers", dtype, device)
    )
    dense = EvaluatedModel(
        checkpoint.name,
        identity,
        checkpoint.directory,
        lambda: _open_transformers(loaded(), checkpoint, dtype),
    )
    if plan is None:
        return [dense]
    contents = load_plan(plan)
    require_same_model(contents, checkpoint)
    pruning = {
        "removed": [str(pair) for pair in sorted(contents.removal_order)],
        "corrections": sha256_file(plan / CORRECTIONS_FILE),
        "trained": contents.trained_files,
    }
    pruned = replace(
        dense,
        identity=identity | pruning,
        open=lambda: _open_pruned(loaded(), checkpoint, plan, dtype),
    )
    return [dense, pruned]


def _find_model(
    model: str, gguf_file: str | None, allow_pickle: bool, where: Where
) -> EvaluatedModel:
    backend = _backend_for(model) if where.backend == "auto" else where.backend
    if backend == "endpoint":
        return EvaluatedModel(model, None, None, lambda: _open_endpoint(model))
    if backend == "onnxruntime":
        return _onnx_model(Path(model))
    checkpoint = open_checkpoint(model, gguf_file, allow_pickle, allow_quantised=backend == "vllm")
    if backend == "vllm":
        dtype = vllm_dtype(where.dtype)
        identity = _identity("vllm", checkpoint.file_hashes, replace(where, dtype=dtype))
        return EvaluatedModel(
            checkpoint.name, identity, checkpoint.directory, lambda: _open_vllm(checkpoint, dtype)
        )
    return checkpoint_models(checkpoint, None, where)[0]


def _backend_for(model: str) -> str:
    if model.startswith(("http://", "https://")):
        return "endpoint"
    if (Path(model) / ONNX_FILE).is_file():
        return "onnxruntime"
    config = Path(model) / "config.json"
    return "vllm" if config.is_file() and is_quantised(read_json_object(config)) else "transformers"


def _identity(backend: str, files: dict[str, str], where: Where) -> dict[str, Any]:
    return asdict(where) | {"backend": backend, "files": files, "gradmap": version("gradmap")}


@contextmanager
def _open_transformers(model: Any, checkpoint: Checkpoint, dtype: str) -> Iterator[Opened]:
    from gradmap.evaluation.transformers_backend import TransformersBackend

    layers = LayeredModel.of(model).layers
    backend = TransformersBackend(model, dtype, end_tokens(checkpoint.directory, checkpoint.config))
    yield Opened(backend, len(layers), count_parameters(model), dtype)


@contextmanager
def _open_pruned(model: Any, checkpoint: Checkpoint, plan: Path, dtype: str) -> Iterator[Opened]:
    contents = load_plan(plan)
    changes = load_changes(plan, contents)
    with (
        LayeredModel.of(model).changed(changes, without=contents.removal_order),
        _open_transformers(model, checkpoint, dtype) as opened,
    ):
        yield opened


@contextmanager
def _open_vllm(checkpoint: Checkpoint, dtype: str) -> Iterator[Opened]:
    from gradmap.evaluation.vllm_backend import VllmBackend

    with waiting(f"vLLM loads {checkpoint.name}"):
        ends = end_tokens(checkpoint.directory, checkpoint.config)
        backend = VllmBackend(checkpoint.directory, checkpoint.config, dtype, ends)
    try:
        yield Opened(backend, _layers_of(checkpoint.config), None, dtype)
    finally:
        backend.close()


@contextmanager
def _open_endpoint(url: str) -> Iterator[Opened]:
    from gradmap.evaluation.endpoint_backend import EndpointBackend

    with waiting(f"Asking {url} for its model"):
        backend = EndpointBackend(url)
    try:
        yield Opened(backend, None, None, None)
    finally:
        backend.close()


def _onnx_model(directory: Path) -> EvaluatedModel:
    if not (directory / ONNX_FILE).is_file():
        raise UserError(
            f"{directory} has no {ONNX_FILE}; give a directory of `gradmap export --format onnx`."
        )
    config = read_sizes(directory)
    with waiting(f"Hashing {directory}"):
        files = {path.name: sha256_file(path) for path in sorted(directory.glob("*.onnx*"))}
    identity = _identity("onnxruntime", files, Where())
    return EvaluatedModel(
        str(directory), identity, directory, lambda: _open_onnx(directory, config)
    )


@contextmanager
def _open_onnx(directory: Path, config: dict[str, Any]) -> Iterator[Opened]:
    from gradmap.evaluation.onnx_backend import OnnxBackend

    with waiting(f"ONNX Runtime loads {directory}"):
        backend = OnnxBackend(directory, config, end_tokens(directory, config))
    yield Opened(backend, _layers_of(config), None, None)


def _layers_of(config: dict[str, Any]) -> int | None:
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    return None if layers is None else int(layers)
