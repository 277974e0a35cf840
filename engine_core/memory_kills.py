"""How often the kernel has killed a process of our group for want of memory."""

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def count_memory_kills(membership: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> int:
    """The counter of out-of-memory kills of this process's control group; 0 where there is none.

    Args:
        membership: the file that names the group of this process, one line per hierarchy.
        root: where control groups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = path.lstrip("/")
        if not controllers:  # the unified hierarchy
            candidates = [root / group / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            candidates = [
                root / "memory" / group / "memory.oom_control",
                root / "memory" / "memory.oom_control",
            ]
        else:
            continue
        for file in candidates:
            if (count := _read_count(file)) is not None:
                return count
    return 0


def _read_count(file: Path) -> int | None:
    try:
        text = file.read_text()
    except OSError:
        return None
    fields = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    count = fields.get("oom_kill", "")
    return int(count) if count.isdigit() else None
