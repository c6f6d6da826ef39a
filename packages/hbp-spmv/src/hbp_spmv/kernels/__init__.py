# SPDX-License-Identifier: Apache-2.0
"""CPU kernels: SIMD vocabulary, worker pool and one file per storage layout."""
