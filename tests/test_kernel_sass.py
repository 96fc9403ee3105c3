"""benchmarks/kernel_sass.py: what is read from machine code, and what ends a build."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# As cuobjdump -sass prints them; most lines, and most of the encodings, are left out.
SM80 = """
	code for sm_80
	.target	sm_80

		Function : _ZN8fastconv4cuda24conv2d_igemm_sm80_kernelIfLi4EEEvi
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0770*/                   LDGSTS.E.BYPASS.LTC128B.128 [R17], [R14.64], P0 ;
                                                          /* 0x000fe8000c901c4a */
        /*32c0*/                   LDSM.16.M88.4 R4, [R78+0x20] ;
        /*3330*/                   HMMA.1688.F32.TF32 R24, R48.reuse, R18, R24 ;
        /*3340*/                   HMMA.1688.F32.TF32 R28, R48, R19, R28 ;
        /*3bf0*/              @!P3 STG.E.128 [R16.64+0x40], R20 ;
        /*3c50*/               @P3 STG.E [R16.64+0x60], R12 ;
		..........
"""
SM90 = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

	code for sm_90a
	.target	sm_90a

		Function : _ZN8fastconv4cuda24conv2d_igemm_sm90_kernelIfLi4EEEvi
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0530*/             @!UP1 UTMALDG.4D.IM2COL.MULTICAST [UR8], [UR4], UR6 ;
        /*0540*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0820*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, UP0 ;
        /*1200*/                   UTMASTG.2D [UR8], [UR12] ;
        /*1270*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
"""


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_sass

    return kernel_sass


def run(sass, monkeypatch, tmp_path, text):
    """The status of a whole run on `text`, and the JSON it leaves."""
    monkeypatch.setattr(sass, "disassemble", lambda file: sass.parse(text.splitlines()))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["kernel_sass.py", "any.so", "--json", str(out)])
    return sass.main(), json.loads(out.read_text()) if out.exists() else []


def test_what_is_counted(sass):
    sm80, sm90 = sass.parse((SM80 + SM90).splitlines())
    assert (sm80.arch, sm90.arch) == ("sm_80", "sm_90a")
    assert sm80.template == "conv2d_igemm_sm80_kernel"
    assert (sm80.instructions, sm90.instructions) == (6, 5)
    assert sm80.opcodes == {"LDSM": 1, "HMMA": 2}
    assert sm80.shapes == {"HMMA.1688.F32.TF32": 2}
    assert sm80.wide == {"copies": 1, "stores": 1} and sm80.narrow == {"stores": 1}
    assert sm90.opcodes == {"UTMALDG": 1, "USETMAXREG": 2, "HGMMA": 1, "UTMASTG": 1}
    assert sm90.shapes == {"HGMMA.64x256x16.F32.BF16": 1}
    assert sm80.faults == sm90.faults == []


def test_a_sound_build(sass, monkeypatch, tmp_path, capsys):
    status, kernels = run(sass, monkeypatch, tmp_path, SM80 + SM90)
    assert status == 0 and [k["arch"] for k in kernels] == ["sm_80", "sm_90a"]
    said = capsys.readouterr().out
    assert "2 kernels, 1 with HMMA, 1 with HGMMA, 0 with faults" in said
    assert "conv2d_igemm_sm90_kernel" in said


# What a slower path, or a mistake in the build, would look like.
PLANTED = [
    (SM80, "STG.E [R16.64+0x60], R12", "STL.64 [R1+0x8], R12", "1 STL: local memory"),
    (SM80, "STG.E [R16.64+0x60], R12", "LDL R12, [R1]", "1 LDL and 0 STL: local memory"),
    (SM80, "HMMA.1688.F32.TF32", "FFMA", "no HMMA"),
    (SM80, "HMMA.1688.F32.TF32", "HGMMA.64x64x8.F32.TF32", "HGMMA, which sm_80 has not"),
    (SM80, ".LTC128B.128 ", ".LTC128B.64 ", "no LDGSTS.128"),
    (SM80, "STG.E.128", "STG.E.64", "no STG.128 or UTMASTG"),
    (SM90, "HGMMA.64x256x16.F32.BF16", "HMMA.16816.F32.BF16", "no HGMMA"),
    (SM90, "UTMALDG.4D.IM2COL.MULTICAST", "LDG.E.128", "no UTMALDG"),
    (SM90, "USETMAXREG", "NOP", "no USETMAXREG"),
    (SM90, "UTMASTG.2D", "STG.E", "no STG.128 or UTMASTG"),
    (SM90, "sm_90a", "sm_90", "compiled for sm_90"),
]


@pytest.mark.parametrize(("text", "sound", "fault", "said"), PLANTED, ids=[p[-1] for p in PLANTED])
def test_a_planted_fault_ends_the_build(
    sass, monkeypatch, tmp_path, capsys, text, sound, fault, said
):
    assert sound in text
    status, (kernel,) = run(sass, monkeypatch, tmp_path, text.replace(sound, fault))
    assert status == 1
    assert said in ", ".join(kernel["faults"]) and said in capsys.readouterr().out


def test_other_kernels_need_no_tensor_cores_but_no_local_memory(sass):
    text = SM80.replace("conv2d_igemm_sm80_kernel", "max_pool2d_fpropa_kernel").replace("HMMA", "X")
    assert sass.parse(text.splitlines())[0].faults == []
    (kernel,) = sass.parse(text.replace("STG.E [", "STL [").splitlines())
    assert kernel.faults == ["0 LDL and 1 STL: local memory"]


@pytest.mark.parametrize(
    "name", ["31conv2d_igemm_sm90_reduce_kernel", "29conv2d_igemm_sm80_join_kernel"]
)
def test_what_adds_up_partial_sums_multiplies_nothing(sass, name):
    text = SM90.replace("24conv2d_igemm_sm90_kernel", name)
    text = text.replace("HGMMA", "FADD").replace("UTMASTG", "STG.E")
    (kernel,) = sass.parse(text.splitlines())
    assert kernel.template == name[2:] and kernel.faults == []


@pytest.mark.parametrize("patches", [False, True])
def test_patches_are_not_copied_but_gathered(sass, patches):
    """Whose kernel says so by its last template argument."""
    text = SM80.replace("IfLi4EEEvi", f"IfLi4ELb{int(patches)}EEEvi").replace("LDGSTS", "LDG")
    (kernel,) = sass.parse(text.splitlines())
    assert kernel.name.endswith(", true>" if patches else ", false>"), kernel.name
    assert kernel.faults == ([] if patches else ["no LDGSTS.128"])


def test_a_build_without_kernels_is_no_success(sass, monkeypatch, tmp_path):
    assert run(sass, monkeypatch, tmp_path, "")[0] == 2
