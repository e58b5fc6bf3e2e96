"""The oracle of storage tests: the protocol of `kara_hf.storage.Store` in the plainest way there is."""

import numpy as np
import torch


class DenseStore:
    """Every row is a Python list of (key, value, position), one entry per stored token; nothing is shared or reused."""

    def __init__(self, sequences, heads, key_dim, value_dim, dtypes):
        self.heads, self.key_dim, self.value_dim, self.dtypes = heads, key_dim, value_dim, dtypes
        self.content = [[[] for _ in range(heads)] for _ in range(sequences)]

    @property
    def lengths(self):
        return np.array([[len(row) for row in rows] for rows in self.content], np.int32).reshape(-1, self.heads)

    def reserve(self, tokens):
        pass

    def append(self, keys, values, positions, real=None):
        for b, rows in enumerate(self.content):
            for h, row in enumerate(rows):
                for s in range(keys.shape[2]):
                    if real is None or bool(real[b, s]):
                        row.append((keys[b, h, s].clone(), values[b, h, s].clone(), int(positions[b, s])))

    def keep(self, sequences, start, slots):
        for i, b in enumerate(sequences.tolist()):
            for h, row in enumerate(self.content[b]):
                self.content[b][h] = row[: int(start[i])] + [row[slot] for slot in slots[i, h].tolist()]

    def crop(self, tokens):
        for rows, count in zip(self.content, tokens.tolist(), strict=True):
            for row in rows:
                del row[len(row) - count :]

    def fork(self, index):
        self.content = [[list(row) for row in self.content[i]] for i in index.tolist()]

    def reset(self, sequences):
        for b in sequences.tolist():
            self.content[b] = [[] for _ in range(self.heads)]

    def read(self, sequence, head):
        row = self.content[sequence][head]
        keys, values = torch.zeros(0, self.key_dim), torch.zeros(0, self.value_dim)
        keys, values = keys.to(self.dtypes[0]), values.to(self.dtypes[1])
        if row:
            keys, values = torch.stack([token[0] for token in row]), torch.stack([token[1] for token in row])
        return keys, values, torch.tensor([token[2] for token in row], dtype=torch.int64)
