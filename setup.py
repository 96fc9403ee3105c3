"""Compiles fastconv._C. What is decided, and refused, is in build_backend/fastconv_decisions.py.

`pip install .` comes here through build_backend/fastconv_backend.py; a developer may call
`python setup.py build_ext --inplace`.
"""

import glob
import json
import os
import runpy
import shutil
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(ROOT, "build_backend"))
import fastconv_decisions as decisions  # noqa: E402

VERSION = runpy.run_path(os.path.join(ROOT, "fastconv", "_version.py"))["__version__"]
FINGERPRINTED = (("csrc",), ("csrc", "core"))
COMPILING_COMMANDS = {"build", "build_ext", "install", "develop", "bdist_wheel", "editable_wheel"}


def sources(with_cuda):
    rooms = ["core/*.cpp", "cpu/*.cpp", "triton/*.cpp", "torch/*.cpp"]
    found = [path for room in rooms for path in glob.glob(os.path.join("csrc", room))]
    cuda = ["csrc/torch/cuda.cpp", *glob.glob("csrc/cuda/*.cpp"), *glob.glob("csrc/cuda/*.cu")]
    found = [path for path in found if path not in cuda]
    return sorted(found + (cuda if with_cuda else []))


def hopper_sources():
    """For sm_90a, whose wgmma and setmaxnreg no other architecture has."""
    return sorted(glob.glob("csrc/cuda/*sm90*.cu"))


def extension(plan):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    kind = CUDAExtension if plan.cuda.build else CppExtension
    # torch adds the C++ standard that its own headers ask for. -g0 undoes a Python built with -g.
    # Its wheels bring a libgomp.so.1, and -fopenmp asks for the same name: one runtime is loaded.
    host = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if plan.cuda.build:
        host.append(f'-DFASTCONV_CUDA_ARCHES="{plan.arches}"')
    macros = ["FASTCONV_WITH_CUDA"] * plan.cuda.build + ["FASTCONV_SM90A"] * plan.hopper.build
    # torch adds the flags of TORCH_CUDA_ARCH_LIST unless a flag has "arch" in it, as a path may
    # ("research"): these name none, and csrc/cuda needs none of torch's.
    nvcc = ["-O3", "-Xcompiler=-fvisibility=hidden,-Wall", *decisions.PLAIN_CUDA_FLAGS]
    made = kind(
        "fastconv._C",
        sorted({*sources(plan.cuda.build)} - {*hopper_sources()}),
        define_macros=[(macro, None) for macro in macros],
        extra_compile_args={"cxx": host, "nvcc": nvcc},
        extra_link_args=["-fopenmp"],
    )
    # torch's own headers as system headers: our warnings are then the only ones.
    system = [flag for folder in made.include_dirs for flag in ("-isystem", folder)]
    host.extend(system)
    made.include_dirs = [os.path.join(ROOT, "csrc")]
    return made


def build_py_command():
    from setuptools.command.build_py import build_py

    class BuildPy(build_py):
        """A build folder outlives its build: a module deleted since must not reach the wheel."""

        def run(self):
            if not self.editable_mode:
                shutil.rmtree(os.path.join(self.build_lib, "fastconv"), ignore_errors=True)
            super().run()
            if self.editable_mode:
                return
            # The emulator is compiled from these on first use (fastconv/emulator.py).
            for room in ("core", "cuda", "emulator", "triton"):
                target = os.path.join(self.build_lib, "fastconv", "csrc", room)
                shutil.copytree(os.path.join("csrc", room), target)

    return BuildPy


def build_ext_command(plan):
    from setuptools.errors import BaseError
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # ninja knows headers and flags; setuptools sees neither

        def build_extension(self, ext):
            if plan.hopper.build:
                # A call of its own, since torch takes one list of architectures a call; a folder
                # of its own, since each call writes a build.ninja.
                flags = dict(ext.extra_compile_args)
                flags["nvcc"] = [*flags["nvcc"], decisions.HOPPER_FLAG]
                folder = os.path.join(self.build_temp, "sm_90a")
                rest = (ext.define_macros, ext.include_dirs, self.debug)
                ext.extra_objects += self.compiler.compile(
                    hopper_sources(), folder, *rest, extra_postargs=flags
                )
            super().build_extension(ext)

        def run(self):
            print(plan.table(VERSION), flush=True)
            try:
                super().run()
            except (RuntimeError, BaseError) as error:
                raise decisions.Refused(f"{error} (the compiler's own words are above).") from None
            folder = ROOT if self.inplace or self.editable_mode else self.build_lib
            digest = runpy.run_path(os.path.join(ROOT, "fastconv", "_source_digest.py"))
            digests = [digest["source_digest"](os.path.join(ROOT, *f)) for f in FINGERPRINTED]
            facts = plan.facts(VERSION, *digests)
            with open(os.path.join(folder, "fastconv", "_build_facts.json"), "w") as file:
                json.dump(facts, file, indent=2)
                file.write("\n")

    return BuildExt


def main():
    decisions.refuse_python()
    decisions.refuse_setuptools()
    from setuptools import Extension, setup

    os.chdir(ROOT)
    options = {}
    commands = {"build_py": build_py_command()}
    modules = [Extension("fastconv._C", [])]  # enough for the metadata and the sdist
    if COMPILING_COMMANDS.intersection(sys.argv):
        plan = decisions.Plan()
        plan.export()
        options = {"build": {"build_base": os.path.join("build", plan.tag)}}
        modules = [extension(plan)]
        commands["build_ext"] = build_ext_command(plan)
    setup(
        ext_modules=modules,
        cmdclass=commands,
        options=options,
        install_requires=[decisions.torch_requirement(decisions.installed_torch())],
    )


if __name__ == "__main__":
    try:
        main()
    except decisions.Refused as refused:
        sys.exit(f"fastconv: {refused}")
