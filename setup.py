"""Build the compiled core and the library of the embedded provider. Metadata is in pyproject.toml.

Everything is found by pattern: each ``.pyx`` below ``llm_datadist/core/`` is one extension module, and all ``.c`` files
below ``llm_datadist/host/`` together make the plain C library ``libldd_host.so``. No toolkit is needed, and one that
is installed changes nothing: the headers come from ``include/``. What does not compile fails the build. What only
measures and what only tests use is compiled on demand, see `PARTS`.
"""
import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HOST_LIBRARY = "llm_datadist.host.libldd_host"
# Packages of compiled modules that users of the library do without, and where their sources are.
PARTS = {
    "bench": ("llm_datadist.tools.bench.native", "tools/bench/native"),
    "tests": ("llm_datadist_probes", "tests/probes"),
}


@dataclass(frozen=True)
class BuildContext:
    """The build knobs, read once.

    Attributes
    ----------
    debug : bool
        ``LDD_DEBUG=1``: bounds, wraparound and initialisation checks in the core, asserts in C, no optimisation.
    sanitize : tuple of str
        ``LDD_SANITIZE=address,undefined`` or ``thread``: sanitizers to build with.
    werror : bool
        ``LDD_WERROR=1``: compiler warnings, Cython warnings and Cython performance hints fail the build.
    parts : tuple of str
        ``LDD_WITH=bench,tests``: what else to compile, names of `PARTS`; default nothing.
    coverage : bool
        ``LDD_COVERAGE=1``: every line counts how often it runs, those of the core as lines of their ``.pyx`` file.
    url : str
        ``LDD_PROJECT_URL=https://...``: the repository, for the metadata of what is published; default none.
    """

    debug: bool = False
    sanitize: Tuple[str, ...] = ()
    werror: bool = False
    parts: Tuple[str, ...] = ()
    coverage: bool = False
    url: str = ""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "BuildContext":
        """Return the context that `environ` asks for; a value that means nothing is an error."""
        sanitize = _names(environ, "LDD_SANITIZE", ("address", "leak", "thread", "undefined"))
        if "thread" in sanitize and "address" in sanitize:
            raise ValueError("LDD_SANITIZE: address and thread exclude each other")
        return cls(
            debug=_flag(environ, "LDD_DEBUG"), sanitize=sanitize, werror=_flag(environ, "LDD_WERROR"),
            parts=_names(environ, "LDD_WITH", tuple(PARTS)), coverage=_flag(environ, "LDD_COVERAGE"),
            url=_url(environ, "LDD_PROJECT_URL"),
        )

    @property
    def directives(self) -> Dict[str, object]:
        """Cython compiler directives."""
        return {
            "language_level": 3, "binding": True, "embedsignature": True, "cdivision": True,
            "boundscheck": self.debug, "wraparound": self.debug, "initializedcheck": self.debug,
        }

    @property
    def compile_args(self) -> List[str]:
        """Arguments of the C compiler, for the core and the host library alike."""
        args = ["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
        # -g0: the interpreter's own flags, which come first, often have -g, which makes objects four times as large.
        args += ["-O1", "-g", "-UNDEBUG", "-DLDD_DEBUG=1"] if self.debug else ["-O3", "-g0"]
        if self.sanitize:
            args += [f"-fsanitize={','.join(self.sanitize)}", "-g", "-fno-omit-frame-pointer"]
            args += ["-fno-sanitize-recover=undefined"] if "undefined" in self.sanitize else []
            # Fences are not modelled. No report hangs on one: whatever they order is atomic besides.
            args += ["-Wno-tsan"] if "thread" in self.sanitize else []
        if self.coverage:
            # Atomic: modules count in threads without the GIL, and warnings about lines would be about the wrong ones.
            args += ["-O0", "--coverage", "-fprofile-update=atomic"]
        if self.werror:
            args.append("-Werror")
        return args

    @property
    def link_args(self) -> List[str]:
        """Arguments of the linker, for the core and the host library alike."""
        args = ["-pthread"]
        if self.sanitize:
            args.append(f"-fsanitize={','.join(self.sanitize)}")
        elif not self.debug and not self.coverage:
            args.append("-Wl,-s")
        if self.coverage:
            args.append("--coverage")
        return args

    @property
    def generated_dir(self) -> str:
        """Where Cython writes C files: one place per set of directives, as its time stamps ignore them."""
        return "build/cython-debug" if self.debug else "build/cython"


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}={value!r}: 0 or 1 expected")
    return value == "1"


def _url(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").rstrip("/")
    if value and not re.fullmatch(r"https?://[^\s/]+/\S+", value):
        raise ValueError(f"{name}={value!r}: the address of a repository expected")
    return value


def _names(environ: Mapping[str, str], name: str, known: Tuple[str, ...]) -> Tuple[str, ...]:
    values = tuple(value for value in environ.get(name, "").split(",") if value)
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"{name}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return values


class BuildExt(build_ext):
    """`build_ext` that translates the core, gives the host library its plain name and keeps Python out of it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = min(os.cpu_count() or 1, 4)

    def run(self) -> None:
        # Not before: source archives and metadata need no translation.
        translate([ext for ext in self.extensions if ext.name != HOST_LIBRARY], BuildContext.read(os.environ))
        super().run()
        if not self.inplace:
            self.forget_others()

    def forget_others(self) -> None:
        """Remove modules that an earlier build has left and this one does not make: they would be installed."""
        made = {Path(path).resolve() for path in self.get_outputs()}
        for path in Path(self.build_lib).rglob("*.so"):
            if path.resolve() not in made:
                path.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        # Asked for with the package and without.
        if fullname in (HOST_LIBRARY, HOST_LIBRARY.rpartition(".")[2]):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> List[str]:
        return [] if ext.name == HOST_LIBRARY else super().get_export_symbols(ext)

    def get_libraries(self, ext: Extension) -> List[str]:
        return list(ext.libraries) if ext.name == HOST_LIBRARY else super().get_libraries(ext)


def _relative(pattern: str) -> List[str]:
    """Paths below the root that match, as setuptools wants them: relative, with forward slashes, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def host_library(context: BuildContext) -> Extension:
    """The C library of the embedded provider."""
    return Extension(
        HOST_LIBRARY,
        sources=_relative("llm_datadist/host/**/*.c"),
        depends=_relative("include/**/*.h") + _relative("llm_datadist/host/**/*.h"),
        include_dirs=["include", "llm_datadist/host"],
        libraries=["dl"],
        extra_compile_args=context.compile_args,
        # Bsymbolic: the library exports the names of CANN. Where a framework has loaded the real ones for everybody,
        # calls between our own files would otherwise go there.
        extra_link_args=context.link_args + ["-Wl,-Bsymbolic"] + ([] if context.sanitize else ["-Wl,-z,defs"]),
    )


def cython_modules(context: BuildContext) -> List[Extension]:
    """The Cython modules of the core, and of those parts that the context asks for."""
    sources = {source[: -len(".pyx")].replace("/", "."): source for source in _relative("llm_datadist/core/**/*.pyx")}
    for package, folder in (PARTS[part] for part in context.parts):
        sources.update((f"{package}.{Path(source).stem}", source) for source in _relative(f"{folder}/*.pyx"))
    # By design of the code that Cython generates: helpers that take all of these paths, only some of which are real.
    noise = ("unused-parameter", "missing-field-initializers", "unused-function", "sign-compare", "array-bounds")
    return [
        Extension(
            name,
            sources=[source],
            depends=_relative("include/**/*.h") + _relative(f"{os.path.dirname(source)}/*.h"),
            include_dirs=["include", os.path.dirname(source)],
            libraries=["dl"],
            extra_compile_args=context.compile_args + [f"-Wno-{warning}" for warning in noise],
            extra_link_args=context.link_args,
        )
        for name, source in sources.items()
    ]


def translate(modules: List[Extension], context: BuildContext) -> None:
    """Translate Cython modules to C and make that their sources."""
    from Cython.Build import cythonize
    from Cython.Compiler import Options

    Options.warning_errors = context.werror
    notes = io.StringIO()
    try:
        with contextlib.redirect_stderr(notes):
            translated = cythonize(
                modules, build_dir=context.generated_dir, compiler_directives=context.directives, force=context.werror
            )
    finally:
        sys.stderr.write(notes.getvalue())
    if context.werror and "performance hint" in notes.getvalue():
        raise SystemExit("Cython gave a performance hint (above): state the exception clause or release it")
    sources = {module.name: module.sources for module in translated}
    for module in modules:
        module.sources = sources[module.name]


def packages(context: BuildContext) -> Tuple[List[str], Dict[str, str]]:
    """Return the packages and where those live that are not in the directory of their name."""
    tools = ["llm_datadist.tools"] + [f"llm_datadist.tools.{name}" for name in find_packages(str(ROOT / "tools"))]
    found = find_packages(str(ROOT), include=["llm_datadist", "llm_datadist.*", "llm_datadist_v1", "llm_datadist_v1.*"])
    places = {"llm_datadist.tools": "tools", "llm_datadist.include": "include"}
    if "tests" in context.parts:
        package, folder = PARTS["tests"]
        places[package] = folder
        found.append(package)
    return found + ["llm_datadist.include"] + tools, places


def readme(context: BuildContext) -> str:
    """Return README.md; where it is known where the project lives, with links that lead there from anywhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)", f"]({context.url}/blob/HEAD/", text) if context.url else text


def urls(context: BuildContext) -> Dict[str, str]:
    """Return the links that a package index shows."""
    pages = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md", "Security": "SECURITY.md"}
    if not context.url:
        return {}
    return {"Source": context.url, "Issues": f"{context.url}/issues",
            **{name: f"{context.url}/blob/HEAD/{page}" for name, page in pages.items()}}


def main() -> None:
    """Run setuptools."""
    context = BuildContext.read(os.environ)
    names, places = packages(context)
    setup(
        license="Apache-2.0",
        long_description=readme(context),
        long_description_content_type="text/markdown",
        project_urls=urls(context),
        packages=names,
        package_dir=places,
        package_data={
            "llm_datadist": ["py.typed", "*.pyi"],
            **{name: ["*.pxd", "*.pyi"] for name in names if name.startswith("llm_datadist.core")},
            "llm_datadist.include": ["*/*.h"],
            "llm_datadist.tools.demo": ["*.txt"],
        },
        # Stubs are taken by themselves; those of modules that are not compiled are left out.
        exclude_package_data={} if "bench" in context.parts else {PARTS["bench"][0]: ["*.pyi"]},
        ext_modules=cython_modules(context) + [host_library(context)],
        cmdclass={"build_ext": BuildExt},
        include_package_data=False,
        zip_safe=False,
    )


if __name__ == "__main__":
    main()
