"""What `kara-hf pod explore` shows in the terminal."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pod.effect import SharingPath
from ..pod.similarity import LayerSimilarity, groups_of
from ..policy.sharing import PoDSharing

# The saving is shown for sequences that are so many times as long as what is near.
PARTS = 5  # of the saving that was asked for, each a row
MULTIPLES = (2, 4, 8, 16)
COMPARED = {"lead": "the lead of a group", "prev": "the layer below", "all": "every layer of a group"}


def show_sharing(console: Console, similarity: LayerSimilarity, sharing: PoDSharing) -> None:
    """Prints what was measured, the groups of each KV head, and what they save at several lengths."""
    count, longest, origin = len(similarity.tokens), max(similarity.tokens), sharing.origin
    console.print()
    console.print(
        Text(f"{similarity.origin.get('model_name', 'model')} | {count} samples of {longest:,} tokens", "bold")
    )
    console.print(
        f"Similarity: 1 - Jensen-Shannon divergence of attention to {similarity.region} tokens, by the last "
        f"{similarity.queries} queries."
    )
    console.print(f"Threshold {origin['threshold']:.4g}, compared with {COMPARED[origin['compare']]}.")
    if "saving" in origin:
        at = origin["at_tokens"]
        console.print(f"It saves {sharing.saving(at):.1%} at {at:,} tokens; {origin['saving']:.1%} was asked for.")
    console.print(group_table(similarity, sharing))
    if not sharing.followers_share:
        console.print(f"No layer shares. {closest(similarity)}")
        return
    console.print(
        f"{sharing.followers_share:.0%} of the (layer, KV head) pairs follow another layer. They keep keys of "
        f"{sharing.proximal:,} near tokens (sinks {sharing.sinks:,}, recent {sharing.recent:,}) and all values:"
    )
    console.print(saving_table(sharing))


def show_path(console: Console, path: SharingPath, saving: float, tokens: int) -> None:
    """Prints what was measured, what sharing costs at several savings, and the groups of each KV head."""
    sharing, origin = path.group_for(saving, tokens), path.nothing.origin
    console.print()
    console.print(Text(f"{origin['model_name']} | {len(path.tokens)} samples of {max(path.tokens):,} tokens", "bold"))
    costs = Table(highlight=False, caption="KL(unshared || shared) of a token with distant ones, in nats.")
    for name in (f"saved at {tokens:,} tokens", "KL", "follow"):
        costs.add_column(name, justify="right", no_wrap=True)
    for part in range(1, PARTS + 1):
        found = path.group_for(saving * part / PARTS, tokens)
        pairs = f"{found.followers_share:.0%} of the pairs"
        costs.add_row(f"{found.saving(tokens):.1%}", f"{found.origin['divergence']:.4f}", pairs)
    console.print(costs)
    groups = Table(highlight=False, caption="The first layer of each group leads.", caption_justify="left")
    groups.add_column("KV head", justify="right", no_wrap=True)
    groups.add_column("groups of layers", overflow="fold")
    for head in range(sharing.heads):
        groups.add_row(str(head), names_of(groups_of(sharing, head)))
    console.print(groups)


def names_of(groups: list[list[int]]) -> str:
    """Such as ``0 1-3 4``."""
    return " ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


def group_table(similarity: LayerSimilarity, sharing: PoDSharing) -> Table:
    """One row for each KV head: its groups, how many layers follow, and how alike they are to their lead."""
    table = Table(highlight=False, caption="The first layer of each group leads.", caption_justify="left")
    table.add_column("KV head", justify="right", no_wrap=True)
    table.add_column("groups of layers", overflow="fold")
    table.add_column("follow", justify="right", no_wrap=True)
    table.add_column("like their lead: mean", justify="right")
    table.add_column("least", justify="right")
    for head in range(sharing.heads):
        groups = groups_of(sharing, head)
        alike = [float(similarity.similarity[head, group[0], layer]) for group in groups for layer in group[1:]]
        mean, least = (f"{sum(alike) / len(alike):.3f}", f"{min(alike):.3f}") if alike else ("-", "-")
        table.add_row(str(head), names_of(groups), f"{len(alike)} of {sharing.layers}", mean, least)
    return table


def saving_table(sharing: PoDSharing) -> Table:
    """What share of a full cache is saved, at several lengths."""
    lengths = [sharing.proximal * times for times in MULTIPLES]
    table = Table(highlight=False)
    table.add_column("tokens", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    table.add_row("of a full cache saved", *(f"{sharing.saving(length):.1%}" for length in lengths))
    return table


def closest(similarity: LayerSimilarity) -> str:
    """What to do where no layer shares: how alike the most similar neighbours are."""
    neighbours = similarity.similarity.diagonal(1, 1, 2)
    alike = [
        float(neighbours[:, layer - 1].max()) for layer in range(1, similarity.layers) if similarity.may_join(layer)
    ]
    alike = [value for value in alike if not math.isnan(value)]
    if not alike:
        return "No two neighbouring layers have full attention of one kind on one device."
    return f"The most similar neighbours reach {max(alike):.3f}; choose a lower --threshold, or a --saving."
