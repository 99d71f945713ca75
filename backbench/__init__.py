"""Backbench: compare LLM inference kernels under real traffic."""
