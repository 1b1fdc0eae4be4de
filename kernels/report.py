"""What each Triton kernel asks of a GPU, read from its compiled code; no GPU needed.

    python -m kernels.report              every kernel and configuration, sm_80 and sm_90
    python -m kernels.report --defaults   the default configurations only
    python -m kernels.report --arch=90    one architecture

An operator module provides `aot_specs()`: a list of (name, kernel, signature, constants). The name ends in " #i", the
number of the configuration; #0 is the default, " fp32 #0" the one for float32 inputs, and " tf32 #0" the same where
PyTorch allows TF32. The signature types the arguments that are no constants ("*bf16", "i32", "i32:16" for a multiple of
16); the constants may hold num_warps and num_stages. Exit status 1 if a default spills (fp32, with three products in
place of one: more than FP32_STACK), or if no configuration of a kernel stays within the shared memory of a consumer
card.
"""

import argparse
import importlib
import math
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile

OPERATORS = ("gla", "delta", "gsa", "performer", "nsa", "distance", "gated")
ARCHS = (80, 90)
SMALL_SHARED = 99 * 1024
FP32_STACK = 576  # bytes; three products in place of one need three times the operands
COLUMNS = ("registers", "stack", "local", "shared", "programs", "HMMA", "HGMMA", "barriers", "shuffles")
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor; it has 65,536 registers and 64 warps


def specs(operators=OPERATORS):
    out = []
    for name in operators:
        try:
            module = importlib.import_module(f"{__package__ or 'kernels'}.{name}")
        except ModuleNotFoundError:
            continue
        found = module.aot_specs()
        out += found
        for label, dot in (("fp32", "tf32x3"), ("tf32", "tf32")):
            out += [in_fp32(label, dot, *spec) for spec in found if fp32_default(module, *spec)]
    return out


def module_of(name):
    """The operator's, with which a spec's name begins."""
    return importlib.import_module(f"{__package__ or 'kernels'}.{name.partition('_')[0]}")


def launched(name):
    return module_of(name).KERNELS.values()


def fp32_default(module, name, kernel, signature, constants):
    return name.endswith("#0") and "DOT" in constants and constants.get("D", 0) <= getattr(module, "FP32_WIDTH", 0)


def in_fp32(label, dot, name, kernel, signature, constants):
    """A default with inputs of fp32, as it is launched for them, with products in `dot`."""
    own = next(k.fp32 or {} for k in launched(name) if k.function is kernel)
    own = own | getattr(module_of(name), "fp32_sizes", lambda _: {})(constants)
    own = {x: min(n, constants[x]) if x in ("BK", "BV") else n for x, n in own.items()}
    signature = {x: kind.replace("bf16", "fp32") for x, kind in signature.items()}
    products = dict.fromkeys([x for x in ("DOT", "MAP") if x in constants], dot)
    return name.replace(" #", f" {label} #"), kernel, signature, constants | own | products


def compile_spec(kernel, signature, constants, arch):
    import triton
    from triton.backends.compiler import GPUTarget

    constants = dict(constants)
    options = {x: constants.pop(x) for x in ("num_warps", "num_stages") if x in constants}
    types = {x: signature.get(x, "constexpr") for x in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(types) if types[x][0] == "*" or ":16" in types[x]}
    types = {x: kind.removesuffix(":16") for x, kind in types.items()}
    missing = [x for x, kind in types.items() if kind == "constexpr" and x not in constants]
    if missing:
        raise ValueError(f"{kernel.__name__}: neither type nor value for {', '.join(missing)}")
    values = {(i,): constants[x] for i, x in enumerate(types) if types[x] == "constexpr"}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump(cubin, *flags):
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel, signature, constants, arch):
    """A dict with COLUMNS: counts, and bytes for stack and shared. programs: how many fit a multiprocessor at once.
    barriers, shuffles: instructions inside loops, which every step of a loop pays for."""
    compiled = compile_spec(kernel, signature, constants, arch)
    usage = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    sass = cuobjdump(compiled.asm["cubin"], "-sass")
    line = r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^\n;]*)"
    code = [(int(place, 16), name, rest) for place, name, rest in re.findall(line, sass, re.MULTILINE)]
    targets = [(re.search(r"0x([0-9a-f]+)", rest), place) for place, name, rest in code if name == "BRA"]
    loops = [(int(target[1], 16), place) for target, place in targets if target and int(target[1], 16) < place]

    def count(*names, places=((0, math.inf),)):
        return sum(name in names and any(a <= place <= b for a, b in places) for place, name, _ in code)

    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), compiled.metadata.shared
    warps = constants.get("num_warps", 4)
    held = 32 * warps * -(-registers // 8) * 8  # registers are given out by eights
    return {
        "registers": registers,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": count("LDL", "STL"),
        "shared": shared,
        "programs": min(65_536 // held, 64 // warps, SHARED[arch] // (shared + 1024)),
        "HMMA": count("HMMA"),
        "HGMMA": count("HGMMA"),
        "barriers": count("BAR", places=loops),
        "shuffles": count("SHFL", places=loops),
    }


def by_name(name, arch):
    """In a process of a pool: a kernel cannot be sent there."""
    return resources(*next(spec[1:] for spec in specs() if spec[0] == name), arch)


def spills(row):
    return row["stack"] > 0 or row["local"] > 0


def too_much(name, row):
    return row["stack"] > FP32_STACK if " fp32" in name else spills(row)


def faults(rows):
    """One line for each kernel whose default spills or that has no configuration for a consumer card."""
    groups = {}
    for (name, arch), row in rows.items():
        groups.setdefault((name.rsplit(" #", 1)[0], arch), []).append(row)
    out = []
    for (name, arch), found in groups.items():
        if too_much(name, found[0]):
            out.append(f"{name} sm_{arch}: the default spills")
        if min(x["shared"] for x in found) > SMALL_SHARED:
            out.append(f"{name} sm_{arch}: no configuration within {SMALL_SHARED} bytes of shared memory")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defaults", action="store_true", help="the default configurations only")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, choices=ARCHS, help="only this architecture")
    args = parser.parse_args()
    try:
        import triton
    except ImportError:
        sys.exit("kernels.report needs Triton: pip install triton")
    chosen = [x for x in specs() if args.only in x[0] and (not args.defaults or x[0].endswith(" #0"))]
    print(f"triton {triton.__version__}; registers a thread, stack and shared in bytes, local = LDL + STL instructions")
    print(
        f"{'kernel':36}{'BK':>5}{'BV':>5}{'warps':>6}{'stages':>7}{'sm':>4}"
        + "".join(f"{x:>10}" for x in COLUMNS)
        + "  serial steps"
    )
    rows, wanted = {}, [(spec, arch) for spec in chosen for arch in ARCHS if args.arch in (None, arch)]
    with multiprocessing.get_context("fork").Pool() as pool:
        jobs = [pool.apply_async(by_name, (spec[0], arch)) for spec, arch in wanted]
        for (spec, arch), job in zip(wanted, jobs):
            name, constants, row = spec[0], spec[3], job.get()
            rows[name, arch] = row
            tiles = [constants.get(x, "") for x in ("BK", "BV", "num_warps", "num_stages")]
            print(f"{name:36}{tiles[0]:>5}{tiles[1]:>5}{tiles[2]:>6}{tiles[3]:>7}{arch:>4}", end="")
            serial = next(k.serial for k in launched(name) if k.function is spec[1])
            cells = "".join(f"{row[x]:>10}" for x in COLUMNS)
            print(f"{cells}  {serial}{', spills' if spills(row) else ''}", flush=True)
    for name, arch in [x for x, row in rows.items() if row["shared"] > SMALL_SHARED]:  # is there a smaller one?
        others = (spec[0] for spec in specs() if spec[0].startswith(name.rsplit("0", 1)[0]))
        rows |= {(other, arch): by_name(other, arch) for other in others if (other, arch) not in rows}
    found = faults(rows)
    fine = "no default spills too much, and every kernel has a configuration for consumer cards"
    print("\n".join(found) or fine)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
