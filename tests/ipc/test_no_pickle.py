"""The whole source, read: nothing that turns bytes into code is imported or called anywhere.

What a test sends at run time finds the sockets of today; this finds the module of tomorrow.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ipc", "frontend", "engine_core", "executor", "kernels")
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "yaml",
    "multiprocessing", "xmlrpc", "code", "codeop", "runpy", "telnetlib",
}  # fmt: skip
ALLOWED_IMPORTS = {
    ("executor/loader/checkpoint.py", "pickle", "UnpicklingError"),  # to catch it
    # Compiles ahead in forked children that it hears of through anonymous pipes; before any socket.
    ("executor/kernel_compiler.py", "multiprocessing", None),
    # "run SCRIPT": the user's own program, named on the command line.
    ("frontend/compat.py", "runpy", None),
}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "pickle.loads", "send_pyobj", "recv_pyobj",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "torch.package.PackageImporter", "torch.jit.load", "torch.hub.load", "get_object",
}  # fmt: skip
# Readers that open pickles unless they are told not to: the argument that tells them.
GUARDED_CALLS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def sources() -> list[tuple[str, str]]:
    """Every file of the product by its name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def faults(name: str, text: str) -> list[str]:
    """What in a file may turn bytes into code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            imported = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [(node.module or "", alias.name) for alias in node.names]
        else:
            imported = []
        for module, member in imported:
            is_forbidden = module.split(".")[0] in FORBIDDEN_MODULES
            if is_forbidden and (name, module, member) not in ALLOWED_IMPORTS:
                found.append(f"{where} imports {module}")
        if isinstance(node, ast.Call):
            found += [f"{where} {fault}" for fault in _call_faults(node)]
    return found


def _call_faults(node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    keywords = {k.arg: k.value for k in node.keywords}
    found = []
    if called in FORBIDDEN_CALLS or called.split(".")[-1] in FORBIDDEN_CALLS - {"eval", "exec"}:
        found.append(f"calls {called}")
    if called in GUARDED_CALLS:
        argument, wanted = GUARDED_CALLS[called]
        value = keywords.get(argument)
        if not (isinstance(value, ast.Constant) and value.value is wanted):
            found.append(f"calls {called} without {argument}={wanted}")
    for argument in ("trust_remote_code", "shell"):
        value = keywords.get(argument)
        if isinstance(value, ast.Constant) and value.value:
            found.append(f"calls {called} with {argument}={value.value}")
    if called.endswith("Environment") and "jinja" in called:
        found.append(f"makes {called}, which is no sandbox")
    return found


def test_nothing_in_the_product_turns_bytes_into_code() -> None:
    files = sources()
    assert len(files) > 100
    assert [fault for name, text in files for fault in faults(name, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.connection",
        "from cloudpickle import dumps as d",
        "eval(text)",
        "socket.recv_pyobj()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "dist.broadcast_object_list(things)",
        "jinja2.Environment()",
    ],
)
def test_a_planted_line_is_found(line: str) -> None:
    assert len(faults("planted.py", line)) == 1
