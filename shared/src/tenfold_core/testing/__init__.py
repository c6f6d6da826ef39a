# SPDX-License-Identifier: Apache-2.0
"""Help for tests: a pytest plugin, sparse matrices, strategies and one assertion.

Submodules need pytest or hypothesis; nothing outside of tests imports them.
"""
