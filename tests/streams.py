"""Streams that write down what is read of them, for tests of resuming."""

from torch.utils.data import IterableDataset, get_worker_info


class Plain(IterableDataset):
    """Documents, others first in each pass; writes down which it reads, in any process."""

    def __init__(self, file, documents):
        self.file, self.documents = file, documents
        self.epoch = self.at = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        mine = range(first, len(self.documents), step)
        while self.at < len(mine):
            index = (mine[self.at] + self.epoch) % len(self.documents)
            self.at += 1
            with self.file.open("a") as file:
                file.write(f"{self.epoch}:{index}\n")
            yield self.documents[index]
        self.at = 0

    def reads(self):
        return self.file.read_text().split()


class Stream(Plain):
    """One that says where it is."""

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]
