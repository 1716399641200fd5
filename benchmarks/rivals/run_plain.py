"""A contestant: a plain loop over the clients, the one that everybody could write."""

import torch

from benchmarks.common.contest import Marks, arguments, finish
from benchmarks.common.contest_torch import Local, arrays


def main() -> None:
    parser = arguments()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--written", action="store_true", help="as tutorials write it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    local = Local(args.job)
    train, params = local.train_as_written if args.written else local.train, local.params
    marks = Marks()
    for _ in range(args.rounds):
        start = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        for client in range(local.work.clients):
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            train(client)
            with torch.no_grad():
                torch._foreach_add_(total, params)
        with torch.no_grad():
            torch._foreach_copy_(params, torch._foreach_div(total, local.work.clients))
        marks.round()
    finish(args.out, marks, arrays(local.module), ("torch", "numpy"))


if __name__ == "__main__":
    main()
