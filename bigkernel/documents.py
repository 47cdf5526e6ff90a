"""Where the documents of packed rows begin."""

import torch
from torch import Tensor


def document_starts(position_ids: Tensor) -> Tensor:
    """bool [B, S]: where the documents of each row begin, as its positions tell.

    A document starts at the row's first token and where the position returns to 0; gaps, strides
    and repeated positions belong to one document. A 0 after a 0 ends a document of one token,
    unless the row repeats other positions too (as ``arange // 4`` does) or holds nothing but zeros.
    A row whose positions step back to anything but 0 is no row of documents, but one sequence.
    """
    before, here = position_ids[..., :-1], position_ids[..., 1:]
    steps_back = ((here < before) & (here != 0)).any(-1, keepdim=True)
    repeats = ((here == before) & (here != 0)).any(-1, keepdim=True)
    zeros_only = (position_ids == 0).all(-1, keepdim=True)
    after_one_token = (before == 0) & ~(repeats | zeros_only)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[..., 1:] = (here == 0) & ((before > 0) | after_one_token) & ~steps_back
    return starts


def offsets_of_documents(document: Tensor) -> Tensor:
    """int32 [documents + 1], from 0 to the token count, of rows that count as laid end to end.

    Args:
        document: [B, S] numbers that change wherever a new document starts.
    """
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document.diff(dim=-1) != 0
    offsets = starts.flatten().nonzero().flatten()
    total = offsets.new_tensor([document.numel()])
    return torch.cat([offsets, total]).to(torch.int32)
