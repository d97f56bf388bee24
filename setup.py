"""Installs mhkd.py and, where it can be built, the fused loss from csrc/.

    pip install --no-build-isolation .

builds against the PyTorch of this environment: the CPU part always, the CUDA part if this PyTorch
has CUDA and a toolkit of the same major version is found (no GPU is needed). Without a compiler or
a matching toolkit one line says so and the rest is installed. TORCH_CUDA_ARCH_LIST chooses the
architectures, as in PyTorch's own extensions.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

OLDEST_ARCHITECTURE = 75  # Turing; older ones only where TORCH_CUDA_ARCH_LIST asks for them


def say(line: str) -> None:
    print(f"mhkd: {line}", file=sys.stderr, flush=True)


version = setuptools.__version__
# Older versions build the extension, but no wheel.
if "build_ext" not in sys.argv and tuple(map(int, version.split(".")[:2])) < (70, 1):
    say(f"setuptools {version} is too old: run  pip install --upgrade 'setuptools>=70.1'")
    sys.exit(1)


def output_of(*command: str | Path) -> str:
    """What a command prints, nothing where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder. nvcc on the PATH may be a wrapper, so it is asked where it is."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        said = output_of(nvcc, "--dryrun", "any.cu") if nvcc else ""
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        if top:
            return Path(top[1].strip()).resolve()
    return None


def architectures(torch, toolkit: Path) -> str:
    """The visible GPUs', else all that PyTorch and the toolkit support from Turing up, and PTX."""
    if torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(i) for i in gpus}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    listed = output_of(toolkit / "bin" / "nvcc", "--list-gpu-arch")
    of_toolkit = re.findall(r"compute_(\d+)", listed)
    # get_arch_list() is empty without a GPU
    of_torch = re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")
    both = sorted(set(map(int, of_toolkit)) & set(map(int, of_torch)))
    both = [name for name in both if name >= OLDEST_ARCHITECTURE]
    return ";".join(f"{name // 10}.{name % 10}" for name in both or [90]) + "+PTX"


def fused_extension():
    """The extension and the command that builds it, or neither, and a line that says why."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        say("the fused loss is left out: PyTorch is not visible (use --no-build-isolation)")
        return None, None
    compiler = cpp_extension.get_cxx_compiler().split()
    if shutil.which(compiler[0]) is None:
        say(f"the fused loss is left out: there is no C++ compiler ({compiler[0]})")
        return None, None

    # The vector code wants products and sums contracted to one instruction; nothing looks at errno
    # or floating-point traps. -fopenmp compiles with OpenMP but, as it is missing from the link
    # flags, links to none: the functions come from the library that PyTorch has loaded. A second
    # one would bring a second pool of threads. It is GCC's library, without the functions that
    # Clang calls.
    cxx = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    cxx.append("-Wno-psabi")
    if sys.platform == "linux" and "clang" not in output_of(*compiler, "--version"):
        cxx.append("-fopenmp")
    else:
        say("the fused loss will use one thread on the CPU: PyTorch's pool needs GCC on Linux")
    sources = ["csrc/mhkd_loss.cpp", "csrc/mhkd_loss_cpu.cpp"]
    depends = [str(path) for path in sorted(Path("csrc").glob("*.h"))]

    def make(kind, sources, **settings):
        extension = kind("_mhkd_fused", sources, depends=depends, **settings)
        extension.libraries.remove("torch_python")  # it needs no Python
        return extension

    extension = cpu = make(cpp_extension.CppExtension, sources, extra_compile_args={"cxx": cxx})
    if torch.version.cuda:
        toolkit = find_toolkit()
        version = output_of(toolkit / "bin" / "nvcc", "--version") if toolkit else ""
        release = re.search(r"release (\d+)\.\d+", version)
        if release and release[1] == torch.version.cuda.split(".")[0]:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(torch, toolkit))
            cpp_extension.CUDA_HOME = str(toolkit)
            nvcc = ["-O3", f"--threads={min(4, os.cpu_count() or 1)}"]
            extension = make(
                cpp_extension.CUDAExtension,
                [*sources, "csrc/mhkd_loss_cuda.cu"],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
            )
            names = os.environ["TORCH_CUDA_ARCH_LIST"]
            say(f"the fused loss for CPU and for CUDA {names}, toolkit {toolkit}")
        else:
            found = f"that at {toolkit} is another" if toolkit else "there is none"
            needed = f"PyTorch needs the toolkit (nvcc) of CUDA {torch.version.cuda}"
            say(f"the fused loss for the CPU alone: {needed}, {found}")

    class Build(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs):
            # a plain library: _mhkd_fused.so
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def build_extensions(self):
            try:
                return super().build_extensions()
            except Exception as error:  # whatever it is, mhkd.py works without
                reason = str(error).splitlines()[0]
            if extension is not cpu:
                say(f"the fused loss for the CPU alone: the CUDA part fails to compile ({reason})")
                for name in ("sources", "extra_compile_args", "include_dirs", "libraries"):
                    setattr(self.extensions[0], name, getattr(cpu, name))
                try:
                    return super().build_extensions()
                except Exception as error:
                    reason = str(error).splitlines()[0]
            say(f"the fused loss is left out: it does not compile ({reason})")
            self.extensions = []

    return extension, Build


here = Path(__file__).resolve().parent
extension, build = fused_extension()
setup(
    name="mhkd",
    version=re.search(r'__version__ = "(.+)"', (here / "mhkd.py").read_text())[1],
    description="Multi-head knowledge distillation: the reference implementation",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "all": ["torchvision", "tqdm", "scikit-learn", "scipy", "matplotlib"],
        "test": ["pytest", "hypothesis", "ruff"],
    },
    py_modules=sorted(path.stem for path in here.glob("mhkd*.py")),
    entry_points={"console_scripts": ["mhkd = mhkd:main", "mhkd-tables = mhkd_tables:main"]},
    ext_modules=[extension] if extension else [],
    cmdclass={"build_ext": build} if build else {},
)
