"""What the audit reads out of a kernel's code."""

from adatape_kernels.benchmarks.audit.generated_code import CodeFacts, facts_of_ptx, facts_of_sass

PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b32 { %r5 }, [ %rd2 + 0 ];
    @%p2 cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
    cp.async.ca.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x4, %r7;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    st.global.b16 [ %rd4 + 0 ], { %rs1 };
    atom.global.gpu.relaxed.add.v4.f32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ], { %f1 };
"""
TTGIR = """
    %9 = ttg.async_wait %7, %8 {num = 1 : i32}
    %12 = ttg.async_wait {num = 0 : i32}
"""


def test_accesses_of_ptx_and_copies_in_flight():
    """Of 16 + 4 + 16 + 4 + 2 + 16 bytes 48 are accessed by 16 at once."""
    assert facts_of_ptx(PTX, TTGIR) == CodeFacts(in_flight=1, wide=100 * 48 // 58, **NONE)
    assert facts_of_ptx("", "") == CodeFacts(in_flight=0, wide=0, **NONE)


NONE = {"bf16": 0, "fp16": 0, "tf32": 0}


def test_products_of_each_generation_by_dtype():
    ptx = """
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 { %r1 }, %rd1, %rd2, %p1, 1, 1, 0, 0;
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
    @%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
    """
    ttgir = "ttng.tc_gen5_mma %a, %b, %c[], %t, %t : !ttg.memdesc<128x64xbf16, #s>, !ttg.memdesc<"
    assert facts_of_ptx(ptx, ttgir) == CodeFacts(0, 0, bf16=2, fp16=1, tf32=2)
    assert facts_of_ptx(ptx, ttgir.replace("bf16", "f16")) == CodeFacts(0, 0, 1, 2, 2)


def test_machine_code():
    sass = """
        /*0010*/ @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/ LDG.E R5, [R2.64+0x10] ;
        /*0030*/ LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/ STG.E.U16 [R2.64], R5 ;
        /*0050*/ LDGDEPBAR ;
        /*0060*/ DEPBAR.LE SB0, 0x2 ;
        /*0070*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0090*/ HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24 ;
        /*00a0*/ LDS.128 R4, [R2] ;
    """
    assert facts_of_sass(sass) == CodeFacts(2, 100 * 32 // 38, bf16=1, fp16=1, tf32=1)
