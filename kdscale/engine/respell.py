"""A model of a teacher's layers that reads another tokenizer's ids: a new embedding and head, from the teacher's rows.

V = the teacher's vocabulary, W = the student's, D = hidden size.
"""

import torch
from transformers import PreTrainedModel

from kdscale.data.corpus import opening_tokens
from kdscale.data.pairs import TokenizerPair


@torch.no_grad()
def respell(model: PreTrainedModel, pair: TokenizerPair) -> None:
    """Give ``model``, which reads the teacher's ids, embedding and head for the student's.

    A token of both vocabularies keeps its rows; another gets the mean of the rows of the tokens that the teacher reads its bytes
    as (Fast Vocabulary Transfer: Gee et al. 2022, arXiv 2402.09977); one that stands for no text, the mean of all.
    """
    pieces = [_pieces(pair, index) for index in range(pair.vocab_size)]
    for own, other in zip(pair.matches.student_M.tolist(), pair.matches.teacher_M.tolist(), strict=True):
        pieces[own] = [other]
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    old = [module.weight.detach().clone()[: pair.teacher.vocab_size] for module in modules]
    model.resize_token_embeddings(pair.vocab_size, mean_resizing=False)
    for module, rows_VD in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        module.weight.copy_(_means(rows_VD, pieces))
    model.tie_weights()


def _pieces(pair: TokenizerPair, index: int) -> list[int]:
    """The teacher's tokens for the bytes of the student's token ``index``."""
    own, theirs = pair.spellings
    spelled = own[index]
    if not spelled:
        return []
    try:
        found = pair.teacher.encode(spelled.decode())
        return found[opening_tokens(pair.teacher, found) :]
    except UnicodeDecodeError:
        return [theirs.index(bytes([byte])) for byte in spelled if bytes([byte]) in theirs]


def _means(rows_VD: torch.Tensor, pieces_W: list[list[int]]) -> torch.Tensor:
    everywhere_D = rows_VD.float().mean(0)
    return torch.stack([rows_VD[one].float().mean(0) if one else everywhere_D for one in pieces_W]).to(rows_VD.dtype)
