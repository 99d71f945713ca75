"""Workloads come from the package and from files, never from a network."""

import socket

import pytest

from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions


@pytest.mark.parametrize("name", ["sharegpt", "azure-conv", "azure-code", "mooncake", "synthetic", "nano256"])
def test_mistake_10_no_workload_opens_a_connection(name, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError(f"{name} opens a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert make(name, WorkloadOptions(num_requests=4, max_len=2048)).requests
