"""TransformerLens on a GGUF file: its caches, lenses, attribution and patching, with our kernels below.

TransformerLens 4.3 and torch must be installed. Its own bridge for engines that run elsewhere shows hooks
copies of what was computed; here hooks run where values are made, and what they return takes their place.
"""

# ruff: noqa: A002  # TransformerLens' names of arguments

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.bridge_core import BridgeCore
from transformer_lens.model_bridge.driver_protocol import ForwardResult
from transformer_lens.model_bridge.remote_bridge import RemoteBridge
from transformer_lens.model_bridge.sources._driver_base import DriverBase
from transformer_lens.model_bridge.transformer_bridge import TransformerBridge

from ..engine.completion import SMALLEST_CONTEXT
from ..errors import ArgumentError
from ..models.step import Hook, Span
from .attribution import rows_of
from .cache import layers_before
from .points import SQUARE, heads_of, kind_of, lens_names, points

if TYPE_CHECKING:
    from ..model import Model
    from ..models.network import Network

HEADED = frozenset({"q", "q_proj", "k", "k_proj", "v", "attn_heads"})  # heads side by side


class Adapter(ArchitectureAdapter):  # type: ignore[misc]  # where TransformerLens is not installed
    """Says of an architecture that its hooks are named as they are, and that it has no torch module."""

    supports_hf_output_attentions = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.component_mapping: dict[str, Any] = {}


class Driver(DriverBase):  # type: ignore[misc]
    """TransformerLens' contract for engines, on a Model. ``intervene`` takes functions of torch tensors."""

    _supported_features = frozenset({"weight_access", "intervention_callbacks"})

    def __init__(self, model: Model, config: Any) -> None:
        super().__init__(config, None, architecture=model.arch)
        self.model = model
        self.names = lens_names(model.network)
        self.supported_hook_points = frozenset(self.names)

    def forward(
        self,
        input_ids: Any = None,
        *,
        capture: tuple[str, ...] = (),
        intervene: Mapping[str, Any] | None = None,
        max_new_tokens: int = 1,
        return_logits: bool = True,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> ForwardResult:
        """Read prompts of one length: ids [B, T] -> logits [B, T, V]; with ``stop_at_layer``, that residual.

        Functions of ``intervene`` are called with the values at their hook, and may return others. Those of
        attention scores and patterns can replace them for one prompt at a time only.
        """
        if max_new_tokens != 1 or kwargs.get("attention_mask") is not None:
            raise NotImplementedError(
                "this driver reads whole prompts without a mask; Model.generate writes texts"
            )
        for name, value in kwargs.items():
            if value is not None:
                raise NotImplementedError(
                    f"{name}={value!r:.40} would change nothing here; leave it out"
                )
        ids = np.atleast_2d(np.asarray(input_ids))
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise ArgumentError(
                f"tokens of shape {ids.shape}, {ids.dtype}; expected whole numbers [prompts, tokens]"
            )
        net = self.model.network
        kept: dict[str, Any] = {}
        functions: dict[str, list[Any]] = {}
        for name in capture:
            functions.setdefault(self.names[name], []).append(Keep(kept, name))
        for name, function in (intervene or {}).items():
            functions.setdefault(self.names[name], []).append(function)
        layers, last = None, Keep(kept, "stop")
        if stop_at_layer is not None:
            layers = layers_before(net, stop_at_layer)
            before = f"blk.{layers.stop - 1}.out" if layers.stop else "embd"
            functions.setdefault(before, []).append(last)
        out = read_all(net, ids, TorchHooks(net, len(ids), functions), layers)
        logits = None
        if stop_at_layer is not None:
            logits = kept.pop("stop")
        elif return_logits:
            logits = torch.from_numpy(out)
        return ForwardResult(logits=logits, captured=kept)


class Keep:
    """A function for a hook that keeps what it is shown."""

    def __init__(self, kept: dict[str, Any], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, x: Any) -> None:
        self.kept[self.name] = x.detach().clone()


def read_all(net: Network, ids: np.ndarray, hook: Hook, layers: range | None) -> np.ndarray:
    """Logits [B, T, V] of prompts [B, T] in one pass, so that each hook sees all of them."""
    states = []
    for row in ids:
        states.append(net.new_state(max(len(row), SMALLEST_CONTEXT)))
        states[-1].append(row.tolist())
    with net.lock:
        want: Any = "all" if layers is None else "none"
        rows = net.forward([(s, ids.shape[1], want) for s in states], hook, layers=layers)
        return np.stack([np.array(x) for x in rows])


class TorchHooks(Hook):
    """Calls functions of torch tensors at points, in TransformerLens' shapes."""

    def __init__(
        self, net: Network, n_prompts: int, functions: Mapping[str, Sequence[Any]]
    ) -> None:
        self.net, self.n, self.functions = net, n_prompts, functions
        self.squares: dict[str, list[Any]] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        self.squares = {}

    def replaces(self, name: str) -> bool:
        return name in self.functions

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        if kind_of(name) in SQUARE:
            return self.square(name, x)
        shape = (self.n, len(x) // self.n, *x.shape[1:])
        if kind_of(name) in HEADED:
            shape = (*shape[:2], heads_of(self.net, name), -1)
        value = self.called(name, torch.from_numpy(x).reshape(shape))
        return np.asarray(value.detach().reshape(x.shape).numpy(), np.float32)

    def square(self, name: str, x: np.ndarray) -> np.ndarray | None:
        """Scores or patterns [H, T, S], which come prompt by prompt."""
        turns = self.squares.setdefault(name, [])
        turns.append(torch.from_numpy(x))
        if len(turns) < self.n:
            return None
        whole = torch.stack(turns)
        given = whole.clone()
        value = self.called(name, whole)
        if self.n == 1:
            return np.asarray(value[0].detach().numpy(), np.float32)
        if not torch.equal(value, given):
            raise NotImplementedError(
                f"{name} of {self.n} prompts at once can be read, not replaced; give one prompt at a time"
            )
        return None

    def called(self, name: str, value: Any) -> Any:
        """What the functions make of a value, one after the other."""
        for function in self.functions[name]:
            result = function(value)
            value = value if result is None else result
        return value


class Bridge(RemoteBridge):  # type: ignore[misc]
    """A GGUF model as a model of TransformerLens 4.3: pass it to its tools, or call its methods.

    Hooks change the computation. Weights that the tools ask for (``W_U``, ``W_O``, ...) are the file's,
    dequantised; as for TransformerLens' processed models the last norm's weight is in ``W_U``.

    Parameters
    ----------
    model : Model
        A decoder, best loaded with ``compute="exact", kv_type="f32"``.

    Examples
    --------
    ::

        from tinyllm.research.bridge import Bridge

        with tinyllm.load("model.gguf", compute="exact", kv_type="f32") as m:
            lens = Bridge(m)
            logits, cache = lens.run_with_cache("When Mary and John went to the store,")
            print(cache["pattern", 3].shape, cache.logit_attrs(cache.stack_head_results(), " Mary"))
    """

    def __init__(self, model: Model) -> None:
        if not model.config.causal:
            raise ArgumentError(f"{model.arch} is an encoder; the bridge is for decoders")
        self.model = model
        self._stop: int | None = None
        config = config_of(model)
        super().__init__(Adapter(config), None, Driver(model, config))
        self.cfg.device = "cpu"

    # ---- passes

    def forward(
        self,
        input: Any = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        input_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V] of a text, a list of texts of equally many tokens, or tokens; or the loss."""
        given = input_ids if input is None else input
        texts = isinstance(given, str) or (
            isinstance(given, list) and any(isinstance(x, str) for x in given)
        )
        tokens = self.to_tokens(given, prepend_bos) if texts else torch.as_tensor(given)
        if tokens.ndim == 1:
            tokens = tokens[None]
        stop = self._stop if stop_at_layer is None else stop_at_layer
        hooks = {
            name: point
            for name, point in self._hook_registry.items()
            if point.fwd_hooks and self._gated_hook_reason(name) is None
        }
        found = self._driver.forward(tokens, intervene=hooks, stop_at_layer=stop, **kwargs)
        if stop is not None:
            return found.logits
        return self._finalize_return(
            return_type, found.logits, tokens, loss_per_token=loss_per_token
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def run_with_hooks(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Run with hooks, whose results take the place of what they are shown."""
        if kwargs.get("bwd_hooks"):
            raise NotImplementedError("there are no gradients; leave bwd_hooks out")
        self._reject_start_at_layer(kwargs.get("start_at_layer"))
        return BridgeCore.run_with_hooks(self, input, *args, **kwargs)

    def run_with_cache(
        self,
        input: Any,
        *args: Any,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The output, and an ``ActivationCache`` of all hooks, or of those of ``names_filter``."""
        if isinstance(input, str) or (isinstance(input, list) and isinstance(input[0], str)):
            return self.run_with_cache(
                self.to_tokens(input, kwargs.pop("prepend_bos", None)),
                *args,
                stop_at_layer=stop_at_layer,
                **kwargs,
            )
        if kwargs.get("incl_bwd"):
            raise NotImplementedError("there are no gradients; leave incl_bwd out")
        self._reject_start_at_layer(kwargs.get("start_at_layer"))
        self._stop = stop_at_layer
        try:
            if stop_at_layer is not None:
                kwargs["names_filter"] = self._before(stop_at_layer, kwargs.get("names_filter"))
            return BridgeCore.run_with_cache(self, input, *args, **kwargs)
        finally:
            self._stop = None

    def _before(self, stop: int, names: Any) -> Any:
        """A filter of names that leaves out what a pass does not reach."""
        n = layers_before(self.model.network, stop).stop
        wanted = {names} if isinstance(names, str) else names

        def fits(name: str) -> bool:
            if name.startswith("blocks.") and int(name.split(".")[1]) >= n:
                return False
            chosen = wanted is None or (wanted(name) if callable(wanted) else name in wanted)
            return chosen and not name.startswith("ln_final")

        return fits

    def set_use_attn_result(self, use: bool) -> None:
        """Whether ``attn.hook_result``, what each head adds, is made and kept."""
        self.cfg.use_attn_result = use

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Refused: one norm and one product serve all heads, so none has an input of its own to patch.

        ``get_act_patch_direct_path`` asks for it; ``Model.path_patch`` patches paths between heads.
        """
        if use:
            raise NotImplementedError(
                "direct paths need an input for each head, and these kernels read one for all of a layer; "
                "Model.path_patch lets only the paths between chosen parts carry the difference"
            )

    def close(self) -> None:
        """Nothing: the model is the caller's to close."""

    # ---- texts

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        **_: Any,
    ) -> Any:
        """Tokens [B, T] of a text, or of several with equally many tokens; BOS as the vocabulary asks."""
        t = self.model.tokenizer
        texts = [input] if isinstance(input, str) else list(input)
        if prepend_bos is False:
            rows = [t.encode(x, add_special=False) for x in texts]
        else:
            rows = [self.model.prompt_ids(x) for x in texts]
            if prepend_bos and t.bos is not None:
                rows = [r if r[:1] == [t.bos] else [t.bos, *r] for r in rows]
        if len({len(r) for r in rows}) != 1:
            raise ArgumentError(
                f"texts of {', '.join(str(len(r)) for r in rows)} tokens; expected equally many"
            )
        return torch.tensor(rows)

    def to_string(self, tokens: Any) -> Any:
        """The text of tokens [T], or a list of texts of tokens [B, T]."""
        ids = torch.as_tensor(tokens)
        if ids.ndim > 1:
            return [self.to_string(row) for row in ids]
        return self.model.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """Each token of a text, or of tokens [T] or [1, T], as a text; of a list of texts a list for each."""
        if isinstance(input, list) and input and all(isinstance(x, str) for x in input):
            return [self.to_str_tokens(x, prepend_bos) for x in input]
        ids = self.to_tokens(input, prepend_bos) if isinstance(input, str) else input
        ids = torch.as_tensor(ids)
        row = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if row.ndim != 1:
            raise ArgumentError(f"tokens of shape {tuple(ids.shape)}; expected those of one text")
        return [self.model.tokenizer.decode([i]) for i in row.tolist()]

    def to_single_token(self, text: str) -> int:
        """The token that is this text; ArgumentError if there is none."""
        return self.model._token(text)

    # ---- weights, for tools that read them

    @cached_property
    def W_U(self) -> Any:
        """The head [E, V], with the last norm's weight in it."""
        file, net = self.model._file.tensors, self.model.network
        tensor = file.get("output.weight") or file["token_embd.weight"]
        head = rows_of(net, tensor, "output.weight", 0, tensor.shape[0]) * np.float32(
            net.config.logit_scale
        )
        norm = net.decoder.output_norm
        if norm is not None and norm.weight is not None:
            head = head * np.array(net.be.numpy(norm.weight))
        return torch.from_numpy(np.ascontiguousarray(head.T))

    @cached_property
    def b_U(self) -> Any:
        """The head's bias [V]."""
        bias = self.model._file.tensors.get("output.bias")
        return (
            torch.zeros(self.cfg.d_vocab) if bias is None else torch.from_numpy(bias.dequantize())
        )

    @cached_property
    def blocks(self) -> list[Any]:
        """Each layer's ``attn.W_O`` [H, D, E], ``attn.b_O``, ``mlp.W_out`` [F, E] and ``mlp.b_out``."""
        return [Layer(self.model, i) for i in range(self.cfg.n_layers)]

    @property
    def W_O(self) -> Any:
        """Attention's output matrices [L, H, D, E]."""
        return torch.stack([b.attn.W_O for b in self.blocks])

    def ln_final(self, x: Any) -> Any:
        """The last norm of rows [.., E], without its weight, which is in ``W_U``."""
        if self.cfg.normalization_type != "RMSPre":
            x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.eps)

    def unembed(self, x: Any) -> Any:
        """Logits of normalised rows [.., E]."""
        return x @ self.W_U + self.b_U

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Any:
        """What the biases of all layers before ``layer`` add to the residual stream [E]."""
        total = torch.zeros(self.cfg.d_model)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    tokens_to_residual_directions = TransformerBridge.tokens_to_residual_directions


class Layer:
    """A layer's matrices that write to the residual stream, dequantised when they are asked for."""

    def __init__(self, model: Model, i: int) -> None:
        self.model, self.i = model, i
        self.norm_kind = None

    def _tensor(self, name: str) -> np.ndarray | None:
        full = f"blk.{self.i}.{name}"
        tensor = self.model._file.tensors.get(full)
        if tensor is None:
            return None
        if len(tensor.shape) == 1:
            return np.asarray(tensor.dequantize())
        return rows_of(self.model.network, tensor, full, 0, tensor.shape[0])

    def _bias(self, name: str) -> Any:
        found = self._tensor(name)
        return torch.zeros(self.model.config.n_embd) if found is None else torch.from_numpy(found)

    @cached_property
    def attn(self) -> Any:
        """``W_O`` and ``b_O``."""
        w = self._tensor("attn_output.weight")
        if w is None:
            raise ArgumentError(f"layer {self.i} has no attention with a plain output matrix")
        h = self.model.config.n_head[self.i]
        w = np.ascontiguousarray(w.T).reshape(h, -1, w.shape[0])
        return SimpleNamespace(W_O=torch.from_numpy(w), b_O=self._bias("attn_output.bias"))

    @cached_property
    def mlp(self) -> Any:
        """``W_out`` and ``b_out``."""
        w = self._tensor("ffn_down.weight")
        if w is None:
            raise ArgumentError(f"layer {self.i} has no feed-forward half with one down matrix")
        return SimpleNamespace(
            W_out=torch.from_numpy(np.ascontiguousarray(w.T)), b_out=self._bias("ffn_down.bias")
        )


def config_of(m: Model) -> Any:
    """A model's sizes, under TransformerLens' names."""
    c, net = m.config, m.network
    own = points(net)
    heads = own.get("blk.0.attn_heads")
    width = int(heads.shape[-1]) if heads else c.n_embd
    found = TransformerBridgeConfig(
        d_model=c.n_embd,
        d_head=width // c.n_head[0] if c.n_head[0] else c.n_embd,
        n_layers=c.n_layer,
        n_ctx=m.n_ctx,
        n_heads=c.n_head[0],
        d_vocab=net.n_vocab,
        architecture=m.arch,
        model_name=m.arch,
        eps=c.norm_eps,
        act_fn="silu",
    )
    found.d_mlp = next((int(p.shape[-1]) for n, p in own.items() if kind_of(n) == "ffn_act"), None)
    found.n_key_value_heads = c.n_head_kv[0]
    found.normalization_type = "RMSPre" if c.norm == "rms" else "LNPre"
    found.d_vocab_out = net.n_vocab
    found.final_rms = c.norm == "rms"
    return found
