"""Bytes per rank, from shapes."""

import pytest
from plans import small_config

from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.memory import cache_shapes, kv_bytes_per_token, weight_bytes
from tpdist.plan.shards import Partition


def test_one_rank_holds_every_weight_of_a_llama_7b() -> None:
    config = small_config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )
    weights = decoder_weights(config)
    assert weight_bytes(weights, Partition.even(1), 0, dtype_bytes=2) == 2 * 6_738_415_616
    assert kv_bytes_per_token(config, Partition.even(1), 0, dtype_bytes=2) == 2 * 2 * 32 * 4096


@pytest.mark.parametrize("shares", [(1, 1), (2, 1), (1, 1, 1), (3, 2, 1)])
def test_the_ranks_together_hold_each_split_weight_once(shares: tuple[int, ...]) -> None:
    weights = decoder_weights(small_config(tie_word_embeddings=True))
    partition = Partition(shares)
    whole = weight_bytes(weights, Partition.even(1), 0, dtype_bytes=4)
    replicated = 4 * sum(spec.shape[0] for spec in weights.specs if spec.split is None)
    ranks = sum(weight_bytes(weights, partition, rank, dtype_bytes=4) for rank in range(partition.size))
    assert ranks == whole + (partition.size - 1) * replicated


def test_ranks_that_share_a_key_value_head_each_cache_it() -> None:
    config = small_config(num_attention_heads=8, num_key_value_heads=2)
    assert cache_shapes(config, Partition.even(4), 3) == (((1, 16), (1, 16)),) * 3
    assert [kv_bytes_per_token(config, Partition.even(n), 0, dtype_bytes=2) for n in (1, 2, 4)] == [384, 192, 192]
