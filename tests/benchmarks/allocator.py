"""Live and peak bytes of CPU tensors, counted by the allocator itself: every thread, every kernel's scratch space,
exactly.

    from tests.benchmarks import allocator
    allocator.install()
    allocator.reset_peak()
    ...
    allocator.peak_bytes()

A counting allocator takes the place of PyTorch's (``c10::SetCPUAllocator``) and hands every request on.
torch.profiler's memory events miss what other threads free (gloo's, the autograd engine's), and a dispatch mode misses
scratch space inside kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = r"""
#include <atomic>
#include <mutex>
#include <unordered_map>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {
std::atomic<int64_t> live{0}, peak{0};
std::mutex lock;
std::unordered_map<void*, int64_t> sizes;
c10::Allocator* inner = nullptr;

void release(void* data) {
  if (data == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = sizes.find(data);
    live -= found->second;
    sizes.erase(found);
  }
  inner->raw_deallocate(data);
}

struct Counting final : public c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = inner->raw_allocate(size);
    if (data != nullptr) {
      std::lock_guard<std::mutex> guard(lock);
      sizes[data] = static_cast<int64_t>(size);
      live += static_cast<int64_t>(size);
      if (live > peak) peak = live.load();
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // Kernels that ask for raw memory need the context to be the memory itself, hence the table of sizes.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, std::size_t size) const override { inner->copy_data(target, source, size); }
};

Counting counting;
}  // namespace

extern "C" void install() {
  if (inner == nullptr) {
    inner = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting, 255);
  }
}
extern "C" int64_t live_bytes() { return live; }
extern "C" int64_t peak_bytes() { return peak; }
extern "C" void reset_peak() { peak = live.load(); }
"""


@cache
def _library() -> ctypes.CDLL:
    package = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    name = hashlib.sha256((SOURCE + torch.__version__).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"ringlip-allocator-{os.getuid()}" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}.so")
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{package}/include"]
        command = ["c++", *flags, "-x", "c++", "-", "-o", str(scratch), f"-L{package}/lib", "-lc10"]
        subprocess.run(command, input=SOURCE.encode(), check=True)
        scratch.replace(target)
    library = ctypes.CDLL(str(target))
    library.live_bytes.restype = library.peak_bytes.restype = ctypes.c_int64
    return library


def install() -> None:
    """Counts from now on; what was allocated before stays uncounted, also when it is freed."""
    _library().install()


def live_bytes() -> int:
    """Bytes of tensors alive."""
    return int(_library().live_bytes())


def peak_bytes() -> int:
    """The most bytes alive at once since ``reset_peak``."""
    return int(_library().peak_bytes())


def reset_peak() -> None:
    """The peak starts from what is alive now."""
    _library().reset_peak()
