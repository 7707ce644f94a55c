"""--resume, for the methods that train for long: OUT/<method>.pt, and what must be the same to go on."""

import json

from dia_lib import check_weights, load_checkpoint, save_checkpoint


def same_flags(setting, stored, shots, path):
    """The command's flags, of one number of shots; exits unless path's (stored, if not None) are the same."""
    free = ("data", "out", "device", "resume", "maps", "fpr", "calibrate_all")
    own = {k: v for k, v in vars(setting.args).items() if k not in free}
    own |= {"shots": shots, "fingerprint": setting.data.fingerprint}
    for name, value in own.items():
        if stored is not None and stored.get(name) != value:
            if name == "fingerprint":
                raise SystemExit(f"{path} was made with other images: --resume needs the same --data and "
                                 "--holdout.")
            flag = "--lambda" if name == "weight" else f"--{name.replace('_', '-')}"
            raise SystemExit(f"{path} was made with {flag} {stored.get(name)}, not {value}: --resume needs "
                             "the same command.")
    return own


def results_of(setting, out, shots):
    """metrics.json of a run to resume; None where there is none, or it is to be scored once more."""
    args, path = setting.args, out / "metrics.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text())
    stored = metrics["settings"] | {"shots": len(metrics["shots"])}
    same_flags(setting, stored, shots, path)
    there = (out / "predict.pt").exists() and (not args.maps or (out / "maps").exists())
    if stored["fpr"] != args.fpr or stored.get("calibrate_all", False) != args.calibrate_all or not there:
        return None
    print(f"{out} has its results already")
    return metrics


class Checkpoint:
    """OUT/<method>.pt: model, optimizers and step of a run with so many labelled anomalies, for --resume."""

    def __init__(self, setting, out, model, optimizers, shots):
        self.setting, self.path, self.shots = setting, out / f"{setting.method}.pt", shots
        self.parts = {"model": model, **optimizers}

    def load(self):
        """The step to go on from: 0 without --resume or a checkpoint. Exits if other flags made it."""
        if not self.setting.args.resume or not self.path.exists():
            return 0
        state = load_checkpoint(self.path, self.setting.method, "cpu")
        same_flags(self.setting, state["settings"], self.shots, self.path)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(self, step, lr):
        """Write it, unless a weight is not finite. lr: for that sentence."""
        check_weights(self.parts["model"], step, lr)
        settings = same_flags(self.setting, None, self.shots, self.path)
        save_checkpoint(self.path, self.setting.method, settings,
                        {"step": step, **{name: part.state_dict() for name, part in self.parts.items()}})
