"""What starts another trainer: its program, the launcher's options, the number of devices."""

import re
from dataclasses import dataclass, field

from megatron_embed.config.foreign_table import normalized
from megatron_embed.init.shell_words import ASSIGNMENT

_LAUNCHERS = ("torchrun", "accelerate", "launch", "deepspeed", "python", "python3", "mpirun", "mpiexec", "srun", "env",
              "nohup", "sudo", "time", "uv", "run", "poetry", "exec", "conda", "torch.distributed.run", "bash", "sh",
              "torch.distributed.launch", "accelerate.commands.launch", "deepspeed.launcher.runner")
_TRAINERS = {"swift": "ms-swift", "megatron": "ms-swift", "flagembedding": "FlagEmbedding", "tevatron": "Tevatron",
             "sentence_transformers": "Sentence Transformers", "sentence-transformers": "Sentence Transformers",
             "autotrain": "Sentence Transformers", "baai_general_embedding": "FlagEmbedding"}
_FLAGS = ("standalone", "multi_gpu", "use_deepspeed", "no_python", "u", "use_fsdp", "cpu", "no_local_rank",
          "same_network", "tpu", "use_cpu", "oversubscribe", "allow_run_as_root")
"""Options of launchers that take no value."""
HYDRA = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=.*", re.DOTALL)
"""An option as Hydra spells it: `training.lr=1e-5`."""
_NOT_PROGRAMS = ("echo", "printf", "cat", "[", "[[", "test", "mkdir", "cp", "rm", "mv", "ls", "cd", "pip", "git", "tee",
                 "source", ".", "sleep", "wget", "curl", "nvidia-smi", "huggingface-cli", "hf", "while", "for",
                 "function")
_CONTAINERS = ("docker", "podman", "singularity", "apptainer", "kubectl", "ssh", "srun", "sbatch")
_STARTERS = ("torchrun", "accelerate", "deepspeed", "swift", "megatron", "python", "python3")
NESTED = re.compile(rf"\s*(\w+=\S*\s+)*({'|'.join(_STARTERS)})\s.*", re.DOTALL)
"""A word that is a command of its own, as behind `bash -c`."""
_MODULE = ("m", "module")


@dataclass(frozen=True)
class Launch:
    """One command that trains, or a file of settings."""

    program: str
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set for the command."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the launcher."""
    rest: list[str] = field(default_factory=list)
    """Words behind the program."""
    devices: int | None = None
    """Processes of all nodes, one device each; None: not known."""
    trainer: str = ""
    """A name of the table's trainers; empty: a program that the table does not know."""


def launch_of(words: list[str], variables: dict[str, str]) -> Launch | None:
    """The launch that a command is; None if it has no options.

    Args:
        variables: those that were exported before.
    """
    environment = dict(variables)
    options: dict[str, str] = {}
    launchers: list[str] = []
    words = _inner(words)
    position, program = 0, ""
    while position < len(words) and not program:
        word = words[position]
        position += 1
        assignment = ASSIGNMENT.fullmatch(word)
        if assignment and not word.startswith("-"):
            environment[assignment[1]] = assignment[2]
        elif word.startswith("-"):
            position += _read_option(words, position - 1, options)
        elif word.rpartition("/")[2] in _LAUNCHERS:
            launchers.append(word.rpartition("/")[2])
        else:
            program = word
    rest, trainer = words[position:] if program else words, _trainer(program)
    if trainer == "ms-swift" and rest and not rest[0].startswith("-"):
        program, rest = f"{program} {rest[0]}", rest[1:]
    if program in _NOT_PROGRAMS or not any(word.startswith("--") or is_settings_file(word) or (
            launchers and HYDRA.fullmatch(word)) for word in rest):
        return None
    devices = _devices(options | {normalized(name): value for name, value in environment.items()}, launchers)
    return Launch(program or "a command line", environment, options, rest, devices, trainer or trainer_of_options(rest))


def is_settings_file(word: str) -> bool:
    """Whether a word behind a program names a file of its settings."""
    return word.endswith((".yaml", ".yml", ".json")) and not word.startswith("-")


def _inner(words: list[str]) -> list[str]:
    """The words without those of a container or scheduler in front, unless these are what counts the processes."""
    names = [word.rpartition("/")[2] for word in words]
    start = next((index for index, name in enumerate(names) if name in _STARTERS), None)
    if start is None or names[0] not in _CONTAINERS or (names[0] == "srun" and names[start].startswith("python")):
        return words
    return words[start:]


def _read_option(words: list[str], position: int, options: dict[str, str]) -> int:
    """Put the launcher's option at `position` into `options`; the number of words behind it that are its value."""
    name, equals, value = words[position].partition("=")
    name = normalized(name)
    if equals:
        options[name] = value
    elif name in _FLAGS:
        options[name] = "true"
    elif name not in _MODULE and position + 1 < len(words) and not words[position + 1].startswith("-"):
        options[name] = words[position + 1]
        return 1
    return 0


def _trainer(program: str) -> str:
    parts = re.split(r"[./]", program.lower())
    return next((_TRAINERS[part] for part in parts if part in _TRAINERS), "")


def trainer_of_options(words: list[str]) -> str:
    """The trainer whose options a command has."""
    names = {normalized(word.partition("=")[0]) for word in words if word.startswith("--")}
    if names & {"train_type", "tuner_type", "split_dataset_ratio"} or {"model", "task_type"} <= names:
        return "ms-swift"
    if "train_group_size" in names:
        return "FlagEmbedding" if names & {"train_data", "sentence_pooling_method"} else "Tevatron"
    return "Transformers" if names & {"per_device_train_batch_size", "num_train_epochs"} else ""


def _devices(options: dict[str, str], launchers: list[str]) -> int | None:
    """Processes of all nodes by the launcher's options and variables; None: they do not say."""
    nodes = _number(options.get("nnodes") or options.get("num_nodes") or options.get("num_machines")) or 1
    include = options.get("include")
    if include is not None:
        hosts = [host.partition(":")[2].split(",") for host in include.split("@")]
        return sum(len([name for name in devices if name]) or 1 for devices in hosts)
    for name in ("nproc_per_node", "num_gpus"):
        if name in options:
            count = _number(options[name])
            return None if count is None else count * nodes
    for name in ("num_processes", "np", "n", "ntasks", "world_size"):
        if (count := _number(options.get(name))) is not None:
            return count
    if not {"accelerate", "deepspeed", "accelerate.commands.launch"} & set(launchers):
        return nodes
    visible = [name for name in options.get("cuda_visible_devices", "").split(",") if name.strip()]
    return len(visible) * nodes or None


def _number(text: str | None) -> int | None:
    """The number of an option such as `8` or `1:2`."""
    match = re.fullmatch(r"(\d+:)?(\d+)", text or "")
    return int(match[2]) if match else None
