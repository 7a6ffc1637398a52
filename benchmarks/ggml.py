"""The packed linear against ggml's NVFP4 and Q4_0, by calls of ggml's C interface.

    python benchmarks/ggml.py FOLDER [--threads 1 2] [--repeats R] [--shapes NxK ...] [--json]

FOLDER has a build of ggml, shared, for this processor:

    git clone https://github.com/ggml-org/ggml; cd ggml
    cmake -B build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON; cmake --build build

All products are of one token. ggml rounds fp32 activations to Q8_0 within each product. fgmp
quantizes them once for all linears that read them: ``linear`` is a product alone, ``quantizer`` is
that step, and both count in ``over_nvfp4`` and ``over_q4_0``. Weights are cold: every turn takes
the next of several copies.
"""

import argparse
import ctypes
import json
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from interleaved import Case, copies, machine, medians, random_weight, site

from fgmp.kernels import ops
from fgmp.kernels.check import PLANES

FORMATS = {"nvfp4": 40, "q4_0": 2}
"""``enum ggml_type`` of the formats."""

_CONTEXT_BYTES = 1 << 20
"""Room for the descriptors of a few tensors and of one graph."""


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    _fields_ = (
        *(("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int)),
        *(("threadpool", c_void_p), ("abort_callback", c_void_p), ("abort_data", c_void_p)),
        ("use_ref", c_bool),
    )


def load(folder: Path) -> ctypes.CDLL:
    """The library in a build of ggml, with the types of the functions that are called."""
    libraries = {path.name: path for path in folder.rglob("libggml*.so")}
    missing = {"libggml-base.so", "libggml-cpu.so"} - set(libraries)
    if missing:
        raise SystemExit(f"{folder}: no {' and no '.join(sorted(missing))}; see --help")
    base = ctypes.CDLL(str(libraries["libggml-base.so"]), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(libraries["libggml-cpu.so"]))
    for library, name, result, arguments in (
        (base, "ggml_init", c_void_p, [_InitParams]),
        (base, "ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        (base, "ggml_get_data", c_void_p, [c_void_p]),
        (base, "ggml_type_name", c_char_p, [c_int]),
        (base, "ggml_mul_mat", c_void_p, [c_void_p, c_void_p, c_void_p]),
        (base, "ggml_new_graph", c_void_p, [c_void_p]),
        (base, "ggml_build_forward_expand", None, [c_void_p, c_void_p]),
        (
            *(base, "ggml_quantize_chunk", c_size_t),
            [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
        ),
        (cpu, "ggml_graph_plan", _Plan, [c_void_p, c_int, c_void_p]),
        (cpu, "ggml_graph_compute", c_int, [c_void_p, POINTER(_Plan)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        setattr(cpu, name, function)
    cpu.ggml_cpu_init()
    for name, number in FORMATS.items():
        known = cpu.ggml_type_name(number)
        if known != name.encode():
            raise SystemExit(f"{folder}: type {number} of this ggml is {known!r}, not {name}")
    return cpu


class Product:
    """Products of one token with copies of a weight (N, K) in a format of ggml.

    Attributes:
        output: result of the last product, fp32 (N,).
    """

    def __init__(self, ggml: ctypes.CDLL, name: str, weight: torch.Tensor, x: torch.Tensor) -> None:
        n, k = weight.shape
        self.ggml = ggml
        self.calls = []
        for _ in range(copies(n * k // 2)):
            size = _CONTEXT_BYTES + 4 * (n + k) + n * k
            context = ggml.ggml_init(_InitParams(size, None, False))
            matrix = ggml.ggml_new_tensor_2d(context, FORMATS[name], k, n)
            data = ggml.ggml_get_data(matrix)
            ggml.ggml_quantize_chunk(FORMATS[name], weight.data_ptr(), data, 0, n, k, None)
            token = ggml.ggml_new_tensor_2d(context, 0, k, 1)  # 0: fp32
            ctypes.memmove(ggml.ggml_get_data(token), x.data_ptr(), 4 * k)
            result = ggml.ggml_mul_mat(context, matrix, token)
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, result)
            plan = ggml.ggml_graph_plan(graph, torch.get_num_threads(), None)
            work = ctypes.create_string_buffer(plan.work_size)
            plan.work_data = ctypes.addressof(work)
            self.calls.append((graph, plan, work))
        values = ctypes.cast(ggml.ggml_get_data(result), POINTER(c_float))
        self.output = torch.frombuffer((c_float * n).from_address(_address(values)), dtype=x.dtype)

    def __call__(self, turn: int) -> None:
        graph, plan, _ = self.calls[turn % len(self.calls)]
        self.ggml.ggml_graph_compute(graph, ctypes.byref(plan))


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, c_void_p).value or 0


def measure(ggml: ctypes.CDLL, n: int, k: int, threads: int, repeats: int) -> dict[str, Any]:
    """Microseconds and ratios for one shape and number of threads."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, k, generator=generator), torch.randn(n, k, generator=generator)
    peers = {name: Product(ggml, name, weight, x[0]) for name in FORMATS}
    for name, product in peers.items():
        product(-1)
        error = (product.output - weight @ x[0]).norm() / (weight @ x[0]).norm()
        assert error < 0.25, f"{name}: relative error {error:.2f}, so these are other products"
    constants = site(torch.randn(64, k, generator=generator), "benefit", "search")
    r, threshold = torch.tensor(constants.r), torch.tensor(constants.threshold)
    arguments = (r, constants.sensitivity, threshold, constants.rule, constants.scales)
    units, _ = ops.fake_quantize_activation(x, *arguments)
    packed = [random_weight(n, k, 0.0, seed) for seed in range(copies(n * k // 2))]
    planes = [tuple(getattr(w, name) for name in PLANES) for w in packed]
    t = packed[0].t
    cases: dict[str, Case] = {
        "linear": lambda i: ops.packed_linear(
            units, *planes[i % len(planes)], r, t, None, torch.float32
        ),
        "quantizer": lambda i: ops.fake_quantize_activation(x, *arguments),
        **peers,
    }
    seconds = medians(cases, repeats)
    ours = seconds["linear"] + seconds["quantizer"]
    return {
        "shape": f"{n}x{k}",
        "threads": threads,
        **{f"{name}_us": 1e6 * value for name, value in seconds.items()},
        **{f"over_{name}": seconds[name] / ours for name in FORMATS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ggml = load(args.folder)
    rows = [
        measure(ggml, *map(int, shape.split("x")), threads, args.repeats)
        for threads in dict.fromkeys(args.threads)
        for shape in args.shapes
    ]
    if args.json:
        print(json.dumps({**machine(), "rows": rows}, indent=1))
        return
    for row in rows:
        print(
            f"{row['shape']}, {row['threads']} threads: linear {row['linear_us']:.0f} us, "
            f"quantizer {row['quantizer_us']:.0f} us; {row['over_nvfp4']:.2f} x NVFP4 "
            f"({row['nvfp4_us']:.0f} us), {row['over_q4_0']:.2f} x Q4_0 ({row['q4_0_us']:.0f} us)"
        )


if __name__ == "__main__":
    main()
