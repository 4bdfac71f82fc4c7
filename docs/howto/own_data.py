"""Your own images: put them into two files once, then run any experiment on them."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

import foreshot
from foreshot.data import save_images

# Your arrays: images uint8 (N, C, H, W), labels int64 (N,). Here, scans of digits at 16 x 16.
scans = load_digits()
pixels = torch.tensor(scans.images * 15.9375).to(torch.uint8)[:, None]  # 0 to 16 -> 0 to 255
images = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
labels = torch.tensor(scans.target)
classes = tuple(f"digit {n}" for n in range(10))

folder = Path("mine")
folder.mkdir(exist_ok=True)
for name, part in (("train", slice(0, 1400)), ("test", slice(1400, None))):
    split = foreshot.ImageSet(images[part], labels[part], classes)
    save_images(folder / f"{name}.safetensors", split)

# In a shell: foreshot run digits --set "data={name: tensor, path: ..., test_path: ...}"
data = "{name: tensor, path: mine/train.safetensors, test_path: mine/test.safetensors}"
quick = ["controls=[clean]", "teacher.training.epochs=4", "student.training.epochs=4"]
config = foreshot.load_config("digits", [f"data={data}", "target=3", *quick])
metrics = foreshot.run(config, Path("runs/mine"))

student, clean = metrics["student"], metrics["controls"]["clean"]
print(f"accuracy {student['clean_accuracy']['value']:.1%}, ASR {student['asr']['value']:.1%}")
print(f"clean student: ASR {clean['asr']['value']:.1%}")
assert student["clean_accuracy"]["total"] == len(images) - 1400
assert student["asr"]["total"] == int((labels[1400:] != 3).sum())
