// Plain loops, compiled once for each level of x86-64; the loader picks the best that the machine has.
#pragma once

#include <cstdint>  // defines __GLIBC__ where that is the C library: target_clones needs its indirect functions

#if defined(__clang__)
#define DGATE_KNOWS_LEVELS (__clang_major__ >= 18)
#else
#define DGATE_KNOWS_LEVELS (__GNUC__ >= 12)
#endif

#if defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__) && DGATE_KNOWS_LEVELS
#define DGATE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DGATE_CLONES
#endif

// A clone's helpers must be inlined, or they would be compiled for the oldest level.
#if defined(__GNUC__)
#define DGATE_INLINE inline __attribute__((always_inline))
#else
#define DGATE_INLINE inline
#endif
