"""What ``import cairn`` offers, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import cairn
from cairn.client.calls import GenerateOptions, ListOptions, PrefillOptions
from cairn.client.requests import generate_request, list_request, prefill_request
from cairn.client.sampling import SamplingOptions, sampling_params
from protos import decode_pb2


def test_all_is_what_the_package_defines():
    defined = {
        name
        for name, value in vars(cairn).items()
        if not name.startswith("_") and not inspect.ismodule(value) and value.__module__.startswith("cairn")
    }
    assert defined == set(cairn.__all__)
    assert list(cairn.__all__) == sorted(cairn.__all__)


def test_everything_public_is_documented():
    for name in cairn.__all__:
        public = getattr(cairn, name)
        assert public.__doc__ and not public.__doc__.startswith(f"{name}("), name
        for method_name, method in inspect.getmembers(public, inspect.isfunction):
            if not method_name.startswith("_"):
                assert method.__doc__, f"{name}.{method_name}"


def test_the_declared_options_are_those_that_are_accepted():
    for options, function in (
        (PrefillOptions, prefill_request),
        (ListOptions, list_request),
    ):
        accepted = {
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert set(options.__annotations__) == accepted - {"page_token"}


def test_the_options_of_generate_are_those_that_are_accepted():
    sampling = set(SamplingOptions.__annotations__)
    accepted = {
        parameter.name
        for parameter in inspect.signature(generate_request).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(GenerateOptions.__annotations__) == accepted | sampling
    assert sampling == set(decode_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    with pytest.raises(TypeError, match="tempratur"):
        sampling_params(tempratur=1.0)


def test_the_client_needs_no_model_code():
    code = "import sys, cairn, cairn.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
