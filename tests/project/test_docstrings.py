"""Every public name says what it does, names its parameters, and says what it raises."""
import ast
import enum
import importlib
import inspect
import re
import textwrap

import pytest

import llm_datadist

SECTIONS = {"Parameters", "Returns", "Yields", "Raises", "Notes", "Examples", "See Also", "Attributes", "Warns"}
# The modules that define what clients use; the others of the facade are helpers, with one line each.
MODULES = """
llm_datadist.status llm_datadist.configs llm_datadist.data_type llm_datadist.caches.descriptors
llm_datadist.caches.held_blocks llm_datadist.managers.held_blocks
llm_datadist.caches.keys llm_datadist.caches.handles llm_datadist.managers.transfer_config
llm_datadist.caches.tensor llm_datadist.caches.tensor_view llm_datadist.options.values llm_datadist.options.parser
llm_datadist.utils.utils llm_datadist.utils.log llm_datadist.v2.llm_utils llm_datadist.v2.config
llm_datadist.datadist llm_datadist.managers.cache llm_datadist.managers.kv_cache llm_datadist.managers.task
llm_datadist.managers.cache_task llm_datadist.links.rank_table llm_datadist.caches.tensor_addresses
llm_datadist.managers.memory
""".split()


def public_names():
    """Yield (qualified name, object, function whose parameters it takes or None) of all that those modules define.

    What a module with ``__all__`` leaves out of it is a helper, too.
    """
    yield "llm_datadist", llm_datadist, None
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield module_name, module, None
        public = getattr(module, "__all__", None)
        for name, member in list(vars(module).items()):
            if name.startswith("_") or (public is not None and name not in public):
                continue
            if getattr(member, "__module__", None) != module_name:
                continue
            if inspect.isclass(member):
                yield from of_class(f"{module_name}.{name}", member)
            elif inspect.isroutine(member):
                yield f"{module_name}.{name}", member, member


def of_class(qualified, cls):
    yield qualified, cls, None if issubclass(cls, enum.Enum) else vars(cls).get("__init__")
    for name, member in vars(cls).items():
        if name.startswith("_") or (issubclass(cls, enum.Enum) and isinstance(member, cls)):
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isroutine(function):
            yield f"{qualified}.{name}", function, function
        elif inspect.isdatadescriptor(member):
            yield f"{qualified}.{name}", member, None


NAMES = {name: (member, function) for name, member, function in public_names()}


def faults_of(member, function):
    doc = inspect.cleandoc(member.__doc__ or "")
    if not doc:
        return ["has no docstring"]
    faults = []
    summary = doc.split("\n\n")[0]
    if not summary.endswith((".", ":")) or not (summary[0].isupper() or summary[0] == "`"):
        faults.append(f"summary should be a sentence: {summary!r}")
    for heading, line in re.findall(r"^(\w[\w ]*)\n(-{3,})$", doc, re.M):
        if heading not in SECTIONS or len(heading) != len(line):
            faults.append(f"section {heading!r} is unknown or underlined wrongly")
    if function is None:
        return faults
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in ("self", "cls"):
            continue
        name = re.escape(parameter.name)
        if not re.search(rf"^(\w+, )*{name}(, \w+)* : \S", doc, re.M) and not re.search(rf"`{name}`", doc):
            faults.append(f"parameter {parameter.name} is not described")
    if raises(function) and not re.search(r"\bRaises\b|Error\b|Exception\b", doc):
        faults.append("does not say what it raises")
    return faults


def raises(function):
    """Whether the body has a raise statement of its own."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):       # made at run time, like the constructor of a dataclass
        return False
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    assert faults_of(*NAMES[name]) == []


def test_the_walk_reaches_every_public_class():
    walked = [member for member, _ in NAMES.values()]
    assert [name for name in [*llm_datadist.__all__, "CacheManager"]
            if not any(getattr(llm_datadist, name) is member for member in walked)] == []
    assert {"llm_datadist.configs.LlmConfig.device_id", "llm_datadist.caches.handles.Cache.create_cpu_cache",
            "llm_datadist.managers.cache.CacheManager.pull_blocks",
            "llm_datadist.managers.memory.CacheMemory.register_cache",
            "llm_datadist.status.raise_if_false"} <= set(NAMES)


def undocumented(value):
    return value


def half_documented(value, other):
    """return `value`

    Raises
    ---
    """


def test_the_check_sees_gaps():
    assert faults_of(undocumented, undocumented) == ["has no docstring"]
    assert len(faults_of(half_documented, half_documented)) == 3
