import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.model.gpt2 import GPT2Model, TransformerBlock

MakeModel = Callable[..., GPT2Model]

ORIGINAL_STRUCTURE = """\
GPT2Model(
  (token_embedding): Embedding(50257, 384)
  (position_embedding): Embedding(512, 384)
  (transformer_blocks): ModuleList(
    (0-5): 6 x TransformerBlock(
      (attention): MultiHeadAttention(
        (w_q): Linear(in_features=384, out_features=384, bias=False)
        (w_k): Linear(in_features=384, out_features=384, bias=False)
        (w_v): Linear(in_features=384, out_features=384, bias=False)
        (w_o): Linear(in_features=384, out_features=384, bias=True)
        (dropout): Dropout(p=0.1, inplace=False)
      )
      (feed_forward): PositionwiseFeedForward(
        (linear1): Linear(in_features=384, out_features=1536, bias=True)
        (linear2): Linear(in_features=1536, out_features=384, bias=True)
        (dropout): Dropout(p=0.1, inplace=False)
      )
      (layer_norm1): LayerNorm((384,), eps=1e-05, elementwise_affine=True)
      (layer_norm2): LayerNorm((384,), eps=1e-05, elementwise_affine=True)
      (dropout): Dropout(p=0.1, inplace=False)
    )
  )
  (layer_norm): LayerNorm((384,), eps=1e-05, elementwise_affine=True)
  (output_projection): Linear(in_features=384, out_features=50257, bias=False)
  (dropout): Dropout(p=0.1, inplace=False)
)"""


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))


def test_default_model_prints_as_the_original_project(shipped: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = GPT2Model(**shipped["model"], vocab_size=50257)
    assert str(model) == ORIGINAL_STRUCTURE
    assert model.count_parameters() == 49_434_624


def blocks_of(model: GPT2Model) -> list[TransformerBlock]:
    return [block for block in model.transformer_blocks if isinstance(block, TransformerBlock)]


def to_transformers(model: GPT2Model, config: GPT2Config) -> GPT2LMHeadModel:
    # Their Conv1D keeps its weight transposed, and q, k and v in one matrix.
    weights = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.layer_norm.weight,
        "transformer.ln_f.bias": model.layer_norm.bias,
        "lm_head.weight": model.output_projection.weight,
    }
    for i, block in enumerate(blocks_of(model)):
        attention, feed_forward, name = block.attention, block.feed_forward, f"transformer.h.{i}"
        qkv = (attention.w_q, attention.w_k, attention.w_v)
        weights |= {
            f"{name}.ln_1.weight": block.layer_norm1.weight,
            f"{name}.ln_1.bias": block.layer_norm1.bias,
            f"{name}.ln_2.weight": block.layer_norm2.weight,
            f"{name}.ln_2.bias": block.layer_norm2.bias,
            f"{name}.attn.c_attn.weight": torch.cat([one.weight for one in qkv]).T,
            f"{name}.attn.c_attn.bias": torch.cat(
                [torch.zeros(config.n_embd) if one.bias is None else one.bias for one in qkv]
            ),
            f"{name}.attn.c_proj.weight": attention.w_o.weight.T,
            f"{name}.attn.c_proj.bias": attention.w_o.bias,
            f"{name}.mlp.c_fc.weight": feed_forward.linear1.weight.T,
            f"{name}.mlp.c_fc.bias": feed_forward.linear1.bias,
            f"{name}.mlp.c_proj.weight": feed_forward.linear2.weight.T,
            f"{name}.mlp.c_proj.bias": feed_forward.linear2.bias,
        }
    peer = GPT2LMHeadModel(config)
    peer.load_state_dict(weights, strict=True)
    return peer.eval()


@pytest.mark.parametrize(
    ("tie_weights", "qkv_bias", "activation", "their_activation"),
    [(True, True, "gelu_tanh", "gelu_new"), (False, True, "gelu_tanh", "gelu_new"), (False, False, "gelu", "gelu")],
)
def test_logits_equal_those_of_transformers(
    make_model: MakeModel, tokens: Tensor, tie_weights: bool, qkv_bias: bool, activation: str, their_activation: str
) -> None:
    model = make_model(random=True, tie_weights=tie_weights, qkv_bias=qkv_bias, activation=activation)
    config = GPT2Config(
        vocab_size=61,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=32,
        activation_function=their_activation,
        tie_word_embeddings=tie_weights,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), to_transformers(model, config)(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_token_changes_no_earlier_logits(make_model: MakeModel, tokens: Tensor) -> None:
    model, changed = make_model(random=True), tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_position_matters(make_model: MakeModel) -> None:
    logits = make_model(random=True)(torch.full((1, 12), 7))[0]
    assert len(logits.unique(dim=0)) == 12


def test_first_loss_is_that_of_a_uniform_guess(make_model: MakeModel) -> None:
    tokens = torch.randint(1000, (8, 13), generator=torch.Generator().manual_seed(1))
    logits = make_model(vocab_size=1000)(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


def test_overfits_one_batch(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_tied_weights_are_one_object(make_model: MakeModel) -> None:
    tied, untied = make_model(tie_weights=True), make_model()
    assert tied.output_projection.weight is tied.token_embedding.weight
    assert untied.output_projection.weight is not untied.token_embedding.weight
    assert untied.count_parameters() - tied.count_parameters() == 61 * 16


def test_too_long_input_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="13 positions do not fit the context of 12"):
        make_model()(torch.zeros(1, 13, dtype=torch.int64))


def test_heads_must_divide_the_width(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        make_model(n_heads=3)


def test_dropout_acts_in_training_alone(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model(random=True, dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), make_model(random=True)(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("place", ["attention weights", "attention output", "feed-forward output", "embeddings"])
def test_dropout_acts_at_each_place(make_model: MakeModel, tokens: Tensor, place: str) -> None:
    model = make_model(random=True, dropout=0.5, n_layers=1)
    block = blocks_of(model)[0]
    places: dict[str, nn.Module] = {
        "attention weights": block.attention,
        "attention output": block.dropout,
        "feed-forward output": block.feed_forward.dropout,
        "embeddings": model.dropout,
    }
    places[place].training = True
    assert not torch.equal(model(tokens), model(tokens))
