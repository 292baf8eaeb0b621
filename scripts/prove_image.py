"""Carries out the Dockerfile's CPU target without Docker, and uses the result as its users do.
Needs root, debootstrap.

    python scripts/prove_image.py --model DIR [--keep DIR]

Debian's base comes from debootstrap, each RUN in a chroot of its own, each COPY from this checkout
or an earlier stage. Then the entry point is started as the image's user on a read-only root with
the model at /model, and has to become ready by the image's own health check, answer a completion,
and end with code 0. What this does not prove: that the names of base images exist, and anything of
the CUDA target.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

ROOT = Path(__file__).parent.parent
SUITE = "bookworm"
# What a build machine may need to reach its package registries; none of it stays in the image.
PASSED_ON = ("PIP_", "UV_", "http_proxy", "https_proxy", "SSL_")
READY_TIMEOUT_S, STOP_TIMEOUT_S = 600, 60
SHARED_MEMORY = (
    "1g"  # --shm-size of the Dockerfile's example; Docker's own 64 MB are too few for vLLM
)
COMPILERS = ("gcc", "g++", "cc", "c++", "ld", "make", "pip", "uv")


@dataclass
class Stage:
    """A root directory, and what its instructions have set."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: int = 0
    entry_point: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)


def read_instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction; continued lines are joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


def build(target: str, work: Path, arguments: Mapping[str, str]) -> Stage:
    """Carries out all stages up to `target`."""
    stages: dict[str, Stage] = {}
    stage = Stage(work)
    for word, rest in read_instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            if target in stages:
                break
            source, _, name = rest.partition(" AS ")
            print(f"== {rest}", flush=True)
            stage = stages[name] = start_stage(source, stages, work / name)
        else:
            carry_out(word, rest, stage, stages, arguments)
    return stages[target]


def start_stage(source: str, stages: Mapping[str, Stage], root: Path) -> Stage:
    if source in stages:
        subprocess.run(
            ["cp", "-a", "--reflink=auto", str(stages[source].root), str(root)], check=True
        )
        return Stage(root, dict(stages[source].environment))
    assert source.startswith("debian:"), f"no root can be made for {source}"
    subprocess.run(
        ["debootstrap", "--variant=minbase", SUITE, str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return Stage(root, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})


def carry_out(
    word: str, rest: str, stage: Stage, stages: Mapping[str, Stage], arguments: Mapping[str, str]
) -> None:
    if word == "RUN":
        print(f"-- RUN {rest}", flush=True)
        run_in(stage, ["/bin/sh", "-c", rest], registry_access())
    elif word == "COPY":
        copy(shlex.split(rest), stage, stages)
    elif word == "ARG":
        name, _, default = rest.partition("=")
        stage.environment[name] = arguments.get(name, default)
    elif word == "ENV":
        for assignment in shlex.split(rest):
            name, _, value = assignment.partition("=")
            stage.environment[name] = re.sub(
                r"\$(\w+)", lambda match: stage.environment[match[1]], value
            )
    elif word == "WORKDIR":
        stage.directory = rest
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "USER":
        stage.user = int(rest)
    elif word == "ENTRYPOINT":
        stage.entry_point = json.loads(rest)
    elif word == "CMD":
        stage.command = json.loads(rest)
    elif word == "HEALTHCHECK":
        stage.health_check = json.loads(rest.partition("CMD ")[2])
    else:
        assert word == "EXPOSE", f"{word} is not known here"


def copy(words: list[str], stage: Stage, stages: Mapping[str, Stage]) -> None:
    option = words.pop(0).partition("=")[2] if words[0].startswith("--from=") else None
    base = stages[option].root if option else ROOT
    *sources, target = words
    into = stage.root / (
        target if target.startswith("/") else f"{stage.directory}/{target}"
    ).lstrip("/")
    for source in sources:
        path = base / source.lstrip("/")
        place = into / path.name if target.endswith("/") else into
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(
                path,
                place,
                symlinks=True,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy2(path, place)


def chroot_command(
    stage: Stage, command: list[str], mounts: Mapping[str, Path], read_only: bool = False
) -> list[str]:
    """The command that runs another one in the stage's root, in mount and process namespaces of
    its own; `mounts` are read-only, by their place in the root. read_only: all but /tmp and
    /dev/shm, as `docker run --read-only --tmpfs /tmp` does."""
    root = shlex.quote(str(stage.root))
    lines = [f"mkdir -p {root}{place}" for place in mounts]
    if read_only:
        lines += [
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t tmpfs tmp {root}/tmp",
        ]
    lines += [f"mount --bind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
    lines.append(f"mount -t sysfs -o ro sysfs {root}/sys")
    lines.append(f"mount -t tmpfs -o size={SHARED_MEMORY},mode=1777 shm {root}/dev/shm")
    lines += [
        f"mount --bind -o ro {shlex.quote(str(source))} {root}{place}"
        for place, source in mounts.items()
    ]
    inside = f"cd {shlex.quote(stage.directory)} && exec {shlex.join(command)}"
    user = f"--userspec={stage.user}:{stage.user}"
    lines.append(f"exec chroot {user} {root} /bin/sh -c {shlex.quote(inside)}")
    return [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "/bin/sh",
        "-ec",
        "\n".join(lines),
    ]


def run_in(
    stage: Stage, command: list[str], access: tuple[dict[str, str], dict[str, Path]]
) -> None:
    variables, mounts = access
    shutil.copy2("/etc/resolv.conf", stage.root / "etc" / "resolv.conf")
    environment = variables | stage.environment
    subprocess.run(
        chroot_command(stage, command, mounts),
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def registry_access() -> tuple[dict[str, str], dict[str, Path]]:
    """Variables with which this machine installs packages, and what they name, below /mnt in the
    root."""
    variables, mounts = {}, {}
    for name, value in os.environ.items():
        if name.startswith(PASSED_ON):
            path = Path(value)
            if path.is_absolute() and path.exists():
                place = f"/mnt/{name.lower()}"
                mounts[place] = path if path.is_dir() else path.parent
                value = place if path.is_dir() else f"{place}/{path.name}"
            variables[name] = value
    return variables, mounts


def ask(path: str, key: str, body: dict[str, object] | None = None) -> Any:
    """The server's answer, asked for without a proxy."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(
        f"http://127.0.0.1:8000{path}", json.dumps(body).encode() if body else None, headers
    )
    with build_opener(ProxyHandler({})).open(request) as answer:
        return json.load(answer)


def prove(stage: Stage, model: Path, work: Path) -> dict[str, object]:
    """Starts the entry point as a container would, waits for the health check, asks for a
    completion, stops."""
    places = product(binary_folders(stage), COMPILERS)
    left = [name for folder, name in places if (stage.root / folder / name).exists()]
    assert not left, f"the final stage still has {left}"
    key, mounts = secrets.token_hex(), {"/model": model, "/run/secrets": work / "secrets"}
    mounts["/run/secrets"].mkdir(exist_ok=True)
    (mounts["/run/secrets"] / "api-key").write_text(key)
    command = chroot_command(stage, [*stage.entry_point, *stage.command], mounts, read_only=True)
    started = time.monotonic()
    process = subprocess.Popen(command, env=stage.environment, start_new_session=True)
    while subprocess.run(
        chroot_command(stage, stage.health_check, {}), env=stage.environment, capture_output=True
    ).returncode:
        assert process.poll() is None, "the entry point ended"
        assert time.monotonic() - started < READY_TIMEOUT_S, "not healthy in time"
        time.sleep(1)
    ready_s = time.monotonic() - started
    name = ask("/v1/models", key)["data"][0]["id"]
    body = {"model": name, "prompt": "The capital of France is", "max_tokens": 8}
    text = ask("/v1/completions", key, body)["choices"][0]["text"]
    inside = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(inside[0]), signal.SIGTERM)
    code = process.wait(STOP_TIMEOUT_S)
    assert code == 0, f"ended with {code}"
    size = int(
        subprocess.run(
            ["du", "-sb", str(stage.root)], capture_output=True, text=True
        ).stdout.split()[0]
    )
    return {
        "model": name,
        "completion": text,
        "ready_s": round(ready_s),
        "size_gb": round(size / 1e9, 2),
    }


def binary_folders(stage: Stage) -> list[str]:
    return [folder.lstrip("/") for folder in stage.environment["PATH"].split(":")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a vLLM-ready directory")
    parser.add_argument(
        "--keep", type=Path, help="a directory for the roots; a temporary one is removed"
    )
    options = parser.parse_args()
    # Where a folder of wheels holds torch's CPU build, its own index is not needed.
    arguments = {"TORCH_BACKEND": ""} if os.environ.get("UV_FIND_LINKS") else {}
    work = options.keep or Path(tempfile.mkdtemp(prefix="gradmap-image-"))
    try:
        print(json.dumps(prove(build("cpu", work, arguments), options.model.resolve(), work)))
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
