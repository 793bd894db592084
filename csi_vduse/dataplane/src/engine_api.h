/* decl/engine.h with what it needs in front of it; cffi reads that file without a preprocessor. */
#ifndef VD_ENGINE_API_H
#define VD_ENGINE_API_H

#include <stdint.h>

#include "../decl/engine.h"

#endif
