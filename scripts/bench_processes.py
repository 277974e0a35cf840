"""Processor time and memory of a process tree, by what each process is. Reads /proc alone."""

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of one role have used since they started."""

    main_s: float  # processor time of the main threads
    others_s: float  # of all other threads
    rss_bytes: int

    @property
    def cpu_s(self) -> float:
        """Processor time of all threads."""
        return self.main_s + self.others_s


def usage_by_role(root: int, root_role: str) -> dict[str, Usage]:
    """Use of ``root`` and all its descendants; processes of one role are summed up.

    Roles: "api", "core", "supervisor", "worker", the name of any other module, or "other".
    """
    totals: dict[str, Usage] = {}
    for pid in _tree(root):
        try:
            role = root_role if pid == root else _role(pid)
            own = _usage(pid)
        except OSError:  # it has just ended
            continue
        known = totals.get(role, Usage(0.0, 0.0, 0))
        totals[role] = Usage(
            known.main_s + own.main_s,
            known.others_s + own.others_s,
            known.rss_bytes + own.rss_bytes,
        )
    return totals


def used_between(before: dict[str, Usage], after: dict[str, Usage]) -> dict[str, Usage]:
    """What each role used from one reading to a later one; memory is the later reading's."""
    nothing = Usage(0.0, 0.0, 0)
    return {
        role: Usage(
            late.main_s - before.get(role, nothing).main_s,
            late.others_s - before.get(role, nothing).others_s,
            late.rss_bytes,
        )
        for role, late in after.items()
    }


def _tree(root: int) -> list[int]:
    """``root`` and its descendants, by the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for directory in _PROC.iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(directory.name))
    pids = [root]
    for pid in pids:  # grows while it is read
        pids += children.get(pid, [])
    return pids


def _role(pid: int) -> str:
    arguments = (_PROC / str(pid) / "cmdline").read_bytes().decode().split("\0")
    if "-m" not in arguments:
        return "other"
    module = arguments[arguments.index("-m") + 1]
    if module == "engine_core":
        return "core" if "--core" in arguments else "supervisor"
    return {"executor": "worker", "frontend": "api"}.get(module, module)


def _usage(pid: int) -> Usage:
    main_s = others_s = 0.0
    for task in (_PROC / str(pid) / "task").iterdir():
        used_s = _thread_s(task)
        if task.name == str(pid):
            main_s += used_s
        else:
            others_s += used_s
    pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    return Usage(main_s, others_s, pages * _PAGE_BYTES)


def _thread_s(task: Path) -> float:
    """Nanoseconds where the kernel keeps them, else ticks of ten milliseconds."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        pass
    try:
        fields = (task / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # the thread has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
