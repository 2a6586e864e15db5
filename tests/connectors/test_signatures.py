"""The imitation of vLLM says the same as vLLM, and the connector overrides what there is to override."""
from __future__ import annotations

import importlib.util
import inspect
import sys

import pytest
from connectors.halves import HAS_VLLM, IMITATION

pytestmark = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed; make test-vllm installs and uses it")

MODULE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"


def imitated():
    spec = importlib.util.spec_from_file_location("imitated_base", IMITATION / MODULE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                 # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parameters(function):
    return [(name, parameter.kind, parameter.default is inspect.Parameter.empty)
            for name, parameter in inspect.signature(function).parameters.items()]


def test_every_imitated_method_has_the_real_signature():
    from vllm.distributed.kv_transfer.kv_connector.v1 import base as real

    for name, member in vars(imitated().KVConnectorBase_V1).items():
        if inspect.isfunction(member) or isinstance(member, classmethod):
            function = getattr(member, "__func__", member)
            other = getattr(real.KVConnectorBase_V1, name)
            assert parameters(function) == parameters(getattr(other, "__func__", other)), name
            assert getattr(function, "__isabstractmethod__", False) == \
                getattr(other, "__isabstractmethod__", False), name


def test_every_public_method_of_the_connector_is_one_that_vllm_calls():
    from vllm.distributed.kv_transfer.kv_connector.v1 import base as real

    from llm_datadist.connectors.vllm import LLMDataDistConnector

    known = {*dir(real.KVConnectorBase_V1), *dir(real.SupportsHMA)}
    for name, member in vars(LLMDataDistConnector).items():
        if name.startswith("_"):
            continue
        assert name in known, name
        base = getattr(real.KVConnectorBase_V1, name, None) or getattr(real.SupportsHMA, name)
        ours = getattr(member, "__func__", member)
        assert parameters(ours) == parameters(getattr(base, "__func__", base)), name


def test_the_name_alone_is_enough():
    """As the package is installed with its entry point, which vLLM loads."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    from llm_datadist.connectors import vllm as package

    load_general_plugins()
    package.register()
    assert KVConnectorFactory.get_connector_class_by_name("LLMDataDistConnector") is package.LLMDataDistConnector
