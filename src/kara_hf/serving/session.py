"""Within a session the continuous batching of a model, or of all, compresses with Kara; nothing stays behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from types import MethodType
from typing import Any
from weakref import WeakSet, ref

import transformers

from ..integration.attach import unwrap
from .config import ServingConfig
from .engine import Engine
from .metrics import ServingMetrics
from .query_recorder import QueryRecorder
from .seams import check_internals, check_version


class Serving:
    """What `kara_continuous_batching` yields. Managers and engines are held weakly: they end with the user's.

    Attributes:
        config: the settings.
        metrics: of the newest engine, also when it is gone; all zero before there is one.
    """

    def __init__(self, config: ServingConfig):
        self.config, self.metrics = config, ServingMetrics()
        self._managers: WeakSet[Any] = WeakSet()
        self._engine: ref[Engine] | None = None
        self._recorder = QueryRecorder()

    @property
    def engine(self) -> Engine | None:
        """The newest engine; None before there is one and when it is gone."""
        return None if self._engine is None else self._engine()

    def manager(self, own: Callable[..., Any], model: Any, generation_config: Any, config: Any, hints: Any) -> Any:
        """A `ContinuousBatchingManager` of `model` whose engine has Kara.

        Args:
            own: the model's `init_continuous_batching`.
            model, generation_config, config, hints: as it takes them; the config is not changed.

        Raises:
            ValueError: the engine is to run asynchronously or in CUDA graphs, or there is one without Kara already.
        """
        cached: Any = getattr(model, "_cached_continuous_batching_manager", None)
        if cached is not None and cached not in self._managers:
            raise ValueError(
                "the model keeps a continuous batching manager that was started without Kara; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        config = transformers.ContinuousBatchingConfig() if config is None else copy(config)
        for name in ("use_async_batching", "use_cuda_graph"):
            value = getattr(config, name)
            if value is True or (isinstance(value, tuple) and any(value)):
                raise ValueError(f"{name}={value!r} is not possible with Kara, which acts between steps; leave it out")
            setattr(config, name, False)
        attention = model.config._attn_implementation
        try:
            manager = own(generation_config=generation_config, continuous_batching_config=config, workload_hints=hints)
        except Exception:  # the manager that would put the model's attention back was not made
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            raise
        if manager not in self._managers:
            check_internals({"manager": manager})
            self._managers.add(manager)
            weak = ref(manager)
            manager._create_batch_processor = lambda: self._processor(weak())
        return manager

    def _processor(self, manager: Any) -> Any:
        """What a manager makes its engine with: its own way, then Kara."""
        existed = manager.batch_processor
        processor = type(manager)._create_batch_processor(manager)
        if processor is not existed:
            try:
                engine = Engine(processor, self.config, manager.model)
                if engine.needs_queries:
                    self._recorder.listen(manager.model, engine.pool.layers, engine.record)
            except Exception:
                if manager._original_attn_impl is not None:
                    manager.model.set_attn_implementation(manager._original_attn_impl)
                raise
            self._engine, self.metrics = ref(engine), engine.metrics
        return processor

    def close(self, at_once: bool = False) -> None:
        """Stops managers that still run: once their requests are done, or `at_once`, which fails those."""
        for manager in list(self._managers):
            if manager.is_running():
                manager.stop(hard_stop=at_once)
            manager.destroy()
            vars(manager).pop("_create_batch_processor", None)
            if vars(manager.model).get("_cached_continuous_batching_manager") is manager:
                del manager.model._cached_continuous_batching_manager
        self._managers.clear()
        self._recorder.close()


@contextmanager
def serving_models(config: ServingConfig) -> Iterator[Serving]:
    """Within it the continuous batching of every model of the process has Kara, and it ends all of it at once."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    with _serving(ContinuousMixin, config) as serving:
        try:
            yield serving
        finally:
            serving.close(at_once=True)


@contextmanager
def kara_continuous_batching(model: Any, config: ServingConfig | None = None, **settings: Any) -> Iterator[Serving]:
    """Within it ``model.generate_batch`` and its other entry points to continuous batching compress with Kara.

    Args:
        model: a causal LM of Transformers, or one that PEFT wraps.
        config: the settings, or
        settings: those of `ServingConfig` and `kara_hf.KaraConfig` by name.

    Yields:
        `Serving`, whose `metrics` say what was done.

    Raises:
        ImportError: Transformers is too old.
        ValueError: a setting is not possible, or what `Serving.manager` and `Engine` say.
    """
    config = ServingConfig.of(**settings) if config is None else config
    with _serving(unwrap(model), config) as serving:
        yield serving


@contextmanager
def _serving(owner: Any, config: ServingConfig) -> Iterator[Serving]:
    """Replaces `init_continuous_batching` of a model, or of the class of all."""
    check_version()
    serving, name = Serving(config), "init_continuous_batching"
    before, own = vars(owner).get(name), getattr(owner, name)

    def init(
        model: Any, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        bound = own if hasattr(own, "__self__") else MethodType(own, model)
        return serving.manager(bound, model, generation_config, continuous_batching_config, workload_hints)

    setattr(owner, name, init if isinstance(owner, type) else MethodType(init, owner))
    try:
        yield serving
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
        serving.close()
