"""Build the image, or run a submission in it: ``make docker-build``, ``make docker-submit-*``.

Words come from the environment, where make puts them. Standard library only: it runs on a host that
has an engine and no environment of ours. docs/docker.md says what each argument is for.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Words of submit-<variant> that the container's own make is given; the folders are mounted instead.
HANDED_OVER = (
    "WORKLOAD SIZE SEEDS GPUS F TAU SET SEARCH_SPACE TRIALS STEPS PROCESSES WANDB RULESET VERSION"
).split()
# Settings of the host that the container gets as they are.
PASSED = (
    "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "OMP_NUM_THREADS",
    "SHAMPOO_TELEMETRY", "SHAMPOO_DETERMINISTIC",
)  # fmt: skip


def main(arguments):
    """Compose the engine's command and become it, or print it for DRY_RUN=1; the exit code."""
    words = os.environ
    try:
        if arguments[:1] == ["build"]:
            command = build(words, os.getuid())
        elif arguments[:1] == ["submit"] and len(arguments) == 2:
            command = submit(words, arguments[1], os.getuid(), os.getgid())
        else:
            raise ValueError("arguments: build, or submit VARIANT")
        if words.get("DRY_RUN", "0") not in ("", "0"):
            print(shlex.join(command))
            return 0
        if arguments[0] == "submit":
            folder("OUT", words).mkdir(parents=True, exist_ok=True)
        if shutil.which(command[0]) is None:
            raise ValueError(f"ENGINE={command[0]}: no such program; docker or podman")
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def build(words, uid):
    """``docker build`` with the image's user numbered as the caller, so that OUT is writable."""
    arguments = [f"{name}={words.get(name, '')}" for name in ("BASE", "TORCH", "CUDA")]
    if words.get("ALGOPERF_COMMIT"):
        arguments.append(f"ALGOPERF_COMMIT={words['ALGOPERF_COMMIT']}")
    if uid:  # built by root, the image's user keeps its default number
        arguments.append(f"UID={uid}")
    pairs = [word for argument in arguments for word in ("--build-arg", argument)]
    # Podman's own format has no SHELL, which the Dockerfile sets so that a failing pipe is seen.
    form = ["--format", "docker"] if is_podman(words) else []
    return [*engine(words), "build", *form, *pairs, "--tag", image(words), str(ROOT)]


def submit(words, variant, uid, gid):
    """``docker run`` of ``make submit-<variant>``.

    Raises:
        ValueError: a word is missing or wrong; the message names it.
    """
    data, out = folder("DATA_DIR", words), folder("OUT", words)
    if not data.is_dir():
        raise ValueError(f"DATA_DIR={data}: no such folder")
    command = [*engine(words), "run", "--rm", *gpus(words), "--ipc", "host"]
    if is_podman(words) and uid:
        # Without it a rootless engine maps the caller to root, and --user to nobody's number.
        command += ["--userns", "keep-id"]
    command += ["--user", f"{uid}:{gid}"]
    command += [word for name in PASSED if name in words for word in ("--env", name)]
    command += mount(data, "/data", ["readonly"]) + mount(out, "/results", [])
    given = {name: words[name] for name in HANDED_OVER if words.get(name)}
    if "SEARCH_SPACE" in given:
        space = folder("SEARCH_SPACE", words)
        if not space.is_file():
            raise ValueError(f"SEARCH_SPACE={space}: no such file")
        command += mount(space, "/search_space.json", ["readonly"])
        given["SEARCH_SPACE"] = "/search_space.json"
    command += [image(words), f"submit-{variant}", "HARNESS=algoperf", "DATA_DIR=/data"]
    return command + [f"{name}={value}" for name, value in given.items()]


def gpus(words):
    """Which GPUs the container gets: GPUS= of those that CUDA_VISIBLE_DEVICES leaves, or all.

    Inside they are numbered from 0, so CUDA_VISIBLE_DEVICES itself stays outside.
    """
    count = words.get("GPUS", "")
    if count and not (count.isascii() and count.isdecimal() and int(count) > 0):
        raise ValueError(f"GPUS={count}: an integer of at least 1")
    visible = words.get("CUDA_VISIBLE_DEVICES")
    named = None if visible is None else [name.strip() for name in visible.split(",")]
    if named is not None and (not all(named) or len(named) < int(count or 1)):
        raise ValueError(f"GPUS={count or 'all'}: CUDA_VISIBLE_DEVICES={visible} leaves fewer")
    if named is not None and count:
        named = named[: int(count)]
    if is_podman(words):  # its GPUs are CDI devices
        names = named or ([str(number) for number in range(int(count))] if count else ["all"])
        devices = [word for name in names for word in ("--device", f"nvidia.com/gpu={name}")]
        return [*devices, "--security-opt", "label=disable"]
    # The engine reads this argument as a line of CSV, in which a field with commas is quoted.
    return ["--gpus", '"device=' + ",".join(named) + '"' if named else count or "all"]


def mount(source, target, options):
    """``--mount``, which takes a colon in a path; a comma or quote is quoted as in CSV."""
    text = f"source={source}"
    if any(character in text for character in ',"\n'):
        text = '"' + text.replace('"', '""') + '"'
    return ["--mount", ",".join(["type=bind", text, f"target={target}", *options])]


def folder(name, words):
    """A path word as an absolute path, ``~`` expanded.

    Raises:
        ValueError: the word is empty.
    """
    if not words.get(name):
        raise ValueError(f"{name}= is needed: a folder of this machine")
    return Path(os.path.abspath(os.path.expanduser(words[name])))


def engine(words):
    """The program, which may have arguments: ``ENGINE='sudo docker'``."""
    return shlex.split(words.get("ENGINE") or "docker")


def is_podman(words):
    """Whether the engine is Podman, by its name."""
    return any(Path(word).name.startswith("podman") for word in engine(words))


def image(words):
    """The tag."""
    return f"{words.get('IMAGE') or 'algoperf-shampoo'}:{words.get('TORCH') or '2.13.0'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
