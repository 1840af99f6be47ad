"""Builds adatape_kernels._C with CMake, or says in one line why the package goes without it.

ADATAPE_BUILD=auto (the default) installs plain Python where a tool is missing; `require` makes that
an error, `python` skips the build. ADATAPE_CUDA=auto (the default) leaves out the kernels for GPUs
alone where torch has no CUDA or they cannot be built; `require` makes that an error, `skip` leaves
them out. The folder benchmarks/ becomes adatape_kernels.benchmarks. All else about the package
stands in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError


def find_tool(name: str) -> str | None:
    """The path of a program; pip's cmake and ninja lie beside Python, often not on the PATH."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(places))


def missing_tool() -> str | None:
    """What the compiled part cannot be built without, in words; None if all is there."""
    asked_for = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(map(find_tool, asked_for or ["c++", "g++", "clang++"])):
        return f"no C++ compiler was found ({asked_for[0] if asked_for else 'c++, g++, clang++'})"
    cmake = find_tool("cmake")
    if cmake is None:
        return "CMake was not found (pip install cmake ninja)"
    try:
        version = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    except OSError:  # pip's is a script, whose Python may have gone
        version = ""
    numbers = re.findall(r"\d+", version)[:3]
    if not numbers:
        return f"{cmake} does not run (pip install cmake ninja)"
    # 3.25.1, which is Debian 12's, does not know how nvcc is told to compile C++20.
    if tuple(map(int, numbers)) < (3, 25, 2):
        found = ".".join(numbers)
        return f"CMake 3.25.2 or newer is needed, and {cmake} is {found} (pip install cmake ninja)"
    if find_spec("pybind11") is None and not torch_has_pybind11():
        return "pybind11 is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h was not found (Debian and Ubuntu: python3-dev)"
    return None


def torch_has_pybind11() -> bool:
    """Whether torch, which is not imported for it, brings the headers of pybind11."""
    torch = find_spec("torch")
    return (
        bool(torch and torch.origin)
        and Path(torch.origin, "..", "include", "pybind11", "pybind11.h").resolve().exists()
    )


def torch_has_cuda() -> bool:
    """Whether torch, which is not imported for it, was built with CUDA."""
    torch = find_spec("torch")
    facts = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    return bool(facts and re.search(r"^cuda\b.*= '", facts.read_text(), re.MULTILINE))


def one_of(variable: str, *values: str) -> str:
    """The value of an environment variable, by default the first of those that it may have."""
    value = os.environ.get(variable, values[0])
    if value not in values:
        known = f"{', '.join(values[:-1])} or {values[-1]}"
        raise SetupError(f"{variable} must be {known}, not {value!r}")
    return value


def reason_in(output: str) -> str:
    """The first error that CMake, ninja or a compiler printed, in one line that CMake can take."""
    # A compiler's own words say more than CMake's about it, which come behind them.
    for pattern in (
        r"^\s*nvcc (?:fatal|error)\s*:\s*(.+)$",
        r"\b(?:fatal )?error:\s*(.+)$",
        r"(#error .+)$",
        r"^CMake Error\b.*\n+((?:.+\n)+)",
    ):
        if found := re.search(pattern, output, re.MULTILINE):
            words = re.sub(r"[^\w .,:()/=+*<>'-]+", " ", found[1].replace('"', "'"))
            return " ".join(words.split())[:200]
    return "`pip install -v` shows why"


def check_setuptools() -> None:
    """Name a setuptools that cannot read pyproject.toml before it fails over it at length."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(
            "error: setuptools 77 or newer is needed, and this is "
            f"{setuptools.__version__} (pip install 'setuptools>=77')"
        )


class BuildFailed(CompileError):
    """The compiled part could not be built; `reason` has the first error in one line."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(
            f"the compiled part could not be built, see the messages above ({reason}); "
            "ADATAPE_CUDA=skip installs without its kernels for GPUs, ADATAPE_BUILD=python "
            "without all of it"
        )


def run_aloud(command: list[str | Path | None]) -> None:
    """Run a program and print what it prints, line by line; raises BuildFailed where it fails."""
    pipe = subprocess.PIPE
    lines = []
    with subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    if process.returncode:
        raise BuildFailed(reason_in("".join(lines)))


class CMakeBuild(build_ext):
    """Builds the extension with CMake, or leaves a note that says why there is none."""

    def run(self) -> None:
        """Decide by ADATAPE_BUILD and by the tools at hand."""
        mode = one_of("ADATAPE_BUILD", "auto", "require", "python")
        cuda = one_of("ADATAPE_CUDA", "auto", "require", "skip")
        why = "ADATAPE_BUILD=python asked for it" if mode == "python" else missing_tool()
        for variable, value in (("ADATAPE_BUILD", mode), ("ADATAPE_CUDA", cuda)):
            if why and value == "require":
                raise SetupError(f"{variable}=require, but {why}")
        if not why and find_spec("torch") is None:
            raise SetupError(
                "adatape-kernels is built in an environment that has torch: install torch, then "
                "run `pip install --no-build-isolation .`, or set ADATAPE_BUILD=python"
            )

        # pip shows no output of a build that succeeds, so the reason is installed with the package.
        package = Path("." if self.inplace else self.build_lib, "adatape_kernels")
        note = package / "_build_note.txt"
        for leftover in [note, *package.glob("_C.*.so")]:
            leftover.unlink(missing_ok=True)
        if why:
            self.extensions = []
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{why}\n", encoding="utf-8")
            print(f"adatape-kernels: installed as plain Python, because {why}")
        super().run()
        if not why and (fault := self.fault_of_refusals(package.parent)):
            if mode == "require":
                raise SetupError(f"ADATAPE_BUILD=require, but {fault}")
            for built in package.glob("_C.*.so"):
                built.unlink()
            note.write_text(f"{fault}\n", encoding="utf-8")
            print(f"adatape-kernels: installed as plain Python, because {fault}")

    def fault_of_refusals(self, folder: Path) -> str | None:
        """Say, in words, if an error that the compiled part raises ends the process."""
        command = [sys.executable, "-B", "-m", "adatape_kernels.ops.refusal_probe"]
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        for crash in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
            if done.returncode == -crash:
                return (
                    f"an error raised in C++ ended the process ({crash.name}): the compiler's C++ "
                    "runtime does not fit torch's (CXX names another compiler)"
                )
        return None  # so too where the package could not be imported yet

    def build_extension(self, ext: Extension) -> None:
        """Build with CMake, without the kernels for GPUs where those are what cannot be built."""
        cuda = one_of("ADATAPE_CUDA", "auto", "require", "skip")
        if cuda == "skip":
            self.cmake(ext, why_no_cuda="ADATAPE_CUDA=skip asked for it")
            return
        try:
            self.cmake(ext, require_cuda=cuda == "require")
        except BuildFailed as error:
            required = "require" in (cuda, os.environ.get("ADATAPE_BUILD"))
            if required or not torch_has_cuda():
                raise
            print(f"adatape-kernels: without kernels for GPUs, because {error.reason}")
            self.cmake(ext, why_no_cuda=f"it could not be built here: {error.reason}")

    def cmake(self, ext: Extension, why_no_cuda: str = "", require_cuda: bool = False) -> None:
        """Configure, build and install with CMake, in a tree that the next build takes up again."""
        tree = Path("build", f"cmake-{sys.implementation.cache_tag}")
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        configure = [cmake, "-S", ".", "-B", tree, f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DADATAPE_WITHOUT_CUDA={why_no_cuda}"]
        configure += [f"-DADATAPE_REQUIRE_CUDA={'ON' if require_cuda else 'OFF'}"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # CMake's cache keeps the tools of its first run, which may have changed or gone since.
        names = ("CXX", "CXXFLAGS", "CMAKE_BUILD_TYPE", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
        record = tree / "adatape_settings.txt"
        settings = repr((configure, [os.environ.get(name) for name in names]))
        if not record.exists() or record.read_text() != settings:
            configure.append("--fresh")
        record.unlink(missing_ok=True)

        prefix = Path(self.get_ext_fullpath(ext.name)).parents[1]
        run_aloud(configure)
        record.write_text(settings)
        run_aloud([cmake, "--build", tree])
        run_aloud([cmake, "--install", tree, "--prefix", prefix])


check_setuptools()
# Nothing here is compiled by setuptools: `depends` puts the files into a source distribution.
sources = [str(path) for path in Path("csrc").rglob("*") if path.is_file()]
benchmarks = "adatape_kernels.benchmarks"
setup(
    packages=[
        *find_packages(include=["adatape_kernels*"]),
        benchmarks,
        *(f"{benchmarks}.{folder}" for folder in find_packages("benchmarks")),
    ],
    package_dir={benchmarks: "benchmarks"},
    ext_modules=[Extension("adatape_kernels._C", sources=[], depends=["CMakeLists.txt", *sources])],
    cmdclass={"build_ext": CMakeBuild},
)
