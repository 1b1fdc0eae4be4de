"""The divergence of a student from its teacher, KL(teacher || student), token by token."""

import torch


def kl_divergence(teacher_logits, logits, targets, temperature=1.0):
    """KL(teacher || student) in nats, mean over the positions whose target is not -1. Logits (B, T, V)."""
    # a compiler fuses the formula itself; float16 has no place for a gradient before the loss scale multiplies it
    plain = torch.compiler.is_compiling() or logits.dtype == torch.float16
    kl = divergence if plain else Divergence.apply
    scored = targets >= 0
    return (kl(teacher_logits, logits, temperature) * scored).sum() / scored.sum()


def divergence(teacher_logits, logits, temperature):
    """KL of each position, (B, T)."""
    p, q = ((x.float() / temperature).log_softmax(-1) for x in (teacher_logits, logits))
    return (p.exp() * (p - q)).sum(-1)


class Divergence(torch.autograd.Function):
    """`divergence` and its gradient (softmax(q / t) - softmax(p / t)) / t over rows that stay in cache: with 50,257
    tokens the formula takes as long as the rest of a small student's step."""

    CACHED = 2**18  # logits of each model at a time

    @staticmethod
    def forward(ctx, teacher_logits, logits, temperature):
        rows = max(1, Divergence.CACHED // logits.size(-1))
        kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
        ctx.grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        tensors = (x.flatten(0, 1).split(rows) for x in (teacher_logits, logits, kl[..., None], ctx.grad))
        for *pq, found, grad in zip(*tensors):
            p, q = ((x.float() / temperature).log_softmax(-1) for x in pq)
            e = p.exp()
            found.copy_(p.sub_(q).mul_(e).sum(-1, keepdim=True))
            grad.copy_(q.exp_().sub_(e).div_(temperature))
        return kl

    @staticmethod
    def backward(ctx, grad):
        saved, ctx.grad = ctx.grad, None
        return None, saved.mul_(grad[..., None]), None
