"""Build the C engine as the extension module ``csi_vduse.dataplane._engine`` (cffi API mode).

Run by setuptools through ``cffi_modules``, from the root of the checkout. The interface is read from
decl/engine.h, which the C files include too: there is one declaration of everything.
"""

from pathlib import Path
from platform import machine

from cffi import FFI

_HERE = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(_HERE.parent.parent)) for path in (_HERE / "src").rglob("*.c"))
# A guest writes what this code reads, and a server sends it: what a mistake in it can become is made smaller.
HARDENING = [
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    *{"x86_64": ["-fcf-protection=full"], "aarch64": ["-mbranch-protection=standard"]}.get(machine(), []),
]
LINK_ARGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,-z,separate-code"]
COMPILE_ARGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-flto=auto",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fvisibility=hidden",
    *HARDENING,
]

ffibuilder = FFI()
ffibuilder.cdef((_HERE / "decl" / "engine.h").read_text())
ffibuilder.set_source(
    "csi_vduse.dataplane._engine",
    '#include "engine_api.h"',
    sources=SOURCES,
    include_dirs=[str((_HERE / "src").relative_to(_HERE.parent.parent))],
    libraries=["uring", "ssl", "crypto", "pthread"],
    # cffi's own generated code has unused parameters.
    extra_compile_args=[*COMPILE_ARGS, "-Wno-unused-parameter"],
    extra_link_args=LINK_ARGS,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
