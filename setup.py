"""Builds the extension fusedrnn._C. No downloads, no reading of the builder's CPU: every instruction set is compiled.

OpenMP is compiled in but not linked: its symbols resolve through the copy that torch brings, so that a process has
one OpenMP runtime. FUSEDRNN_CXX_FLAGS and FUSEDRNN_LD_FLAGS add flags of the compiler and the
linker; MAX_JOBS bounds the parallel compile jobs.
"""

import os
import shlex
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
# One translation unit an instruction set: the largest first, so that parallel jobs end together.
SOURCES.sort(key=lambda name: ("isa_" not in name, name))

FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
if sys.platform == "darwin":
    FLAGS.remove("-fopenmp")  # Apple's clang has none: one thread
FLAGS += shlex.split(os.environ.get("FUSEDRNN_CXX_FLAGS", ""))
FLAGS.append(f'-DFUSEDRNN_FLAGS="{" ".join(FLAGS)}"')  # for fusedrnn.info

setup(
    ext_modules=[
        CppExtension(
            "fusedrnn._C",
            SOURCES,
            extra_compile_args=FLAGS,
            extra_link_args=shlex.split(os.environ.get("FUSEDRNN_LD_FLAGS", "")),
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
