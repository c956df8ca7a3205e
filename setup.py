"""Builds the optional C++ extension; everything else stands in pyproject.toml.

The extension links neither libtorch nor Python's torch, so one build serves every torch version. Code for each
instruction set is compiled in and chosen at run time: no -march here, and no -ffast-math. Without a working compiler
the installation succeeds all the same and Numba takes over.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("SPARSEBREG_BUILD_JOBS", default=0).install()

flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has no OpenMP runtime

setup(
    ext_modules=[
        Pybind11Extension(
            "sparsebreg._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/isa/*.cpp") + glob("csrc/bindings/*.cpp")),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[] if sys.platform == "win32" else flags + openmp,
            extra_link_args=[] if sys.platform == "win32" else openmp,
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
