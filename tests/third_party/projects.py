"""Tiny models of other projects, with random weights and data, trained as a user would with our one line.

Packages are imported when a project is created. `losses` is written by hand for the textbook to differentiate.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from textbook import Forward
from third_party.forecasting import neuralforecast, tft
from third_party.project import QUIET, STEPS, Project, import_lightning, loader, trainer
from torch import Tensor, nn
from torch.nn import functional as F

# ---- transformers, peft ----------------------------------------------------------------------------------------------


def bert(lora: bool = False, width: int = 32, layers: int = 2, batch: int = 4) -> Project:
    """Two heads on BERT in a LightningModule as tutorials write it; or LoRA in a frozen BERT."""

    def make(L: ModuleType) -> Any:
        from transformers import BertConfig, BertModel

        class Tutorial(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                config = BertConfig(
                    vocab_size=64,
                    hidden_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                    intermediate_size=2 * width,
                    max_position_embeddings=32,
                )
                self.bert = BertModel(config)
                if lora:
                    from peft import LoraConfig, get_peft_model

                    options = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
                    self.bert = get_peft_model(self.bert, LoraConfig(**options))
                self.intent, self.sentiment = nn.Linear(width, 5), nn.Linear(width, 1)

            def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
                z = self.bert(input_ids=tokens).pooler_output
                return self.intent(z), self.sentiment(z).squeeze(-1)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                tokens, intent, sentiment = batch
                intent_logits, sentiment_score = self(tokens)
                intent_loss = F.cross_entropy(intent_logits, intent)
                sentiment_loss = F.mse_loss(sentiment_score, sentiment)
                loss = intent_loss + 0.5 * sentiment_loss
                parts = {"train/loss": loss, "train/intent": intent_loss, "train/sentiment": sentiment_loss}
                self.log_dict(parts, on_step=True, on_epoch=True)
                return loss

            def configure_optimizers(self) -> Any:
                trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
                return torch.optim.AdamW(trained, lr=1e-3)

        return Tutorial()

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        L, n = import_lightning(), batch * steps
        model = make(L)
        data = loader(torch.randint(64, (n, 12)), torch.randint(5, (n,)), torch.randn(n), size=batch)
        trainer(L, callbacks, **options).fit(model, data)
        return model

    def losses(model: Any, batch: Any) -> Forward:
        tokens, intent, sentiment = batch
        z = model.bert(input_ids=tokens).pooler_output
        score = model.sentiment(z).squeeze(-1)
        chances = model.intent(z).log_softmax(-1)
        own = -chances[torch.arange(len(intent)), intent].mean()
        return Forward({"intent": own, "sentiment": (score - sentiment).square().mean()})

    return Project(
        ["transformers", "peft"] if lora else ["transformers"],
        {"tasks": {"intent": "train/intent", "sentiment": "train/sentiment"}},
        fit,
        losses,
        coefficients={"intent": 1.0, "sentiment": 0.5},
        found=(
            "W = bert.base_model.model.encoder.layer.1.attention.self.value.lora_B.default.weight (32 × 4), "
            if lora
            else "W = bert.pooler.dense.weight (32 × 32), "
        )
        + "heads: intent → intent, sentiment → sentiment, losses: logged as train/intent, train/sentiment",
    )


# ---- scvi-tools ------------------------------------------------------------------------------------------------------


def scvi(adversarial: bool = False, width: int = 32, batch: int = 16) -> Project:
    """SCVI, which returns its total and keeps reconstruction and KL for each cell; or trained by hand against a classifier."""

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        import_lightning()
        import anndata
        import numpy as np
        import scvi as package

        class Adversarial(package.model.SCVI):
            _training_plan_cls = package.train.AdversarialTrainingPlan

        package.settings.seed = 0
        noise, n = np.random.default_rng(0), batch * steps
        cells = anndata.AnnData(noise.poisson(2.0, (n, 20)).astype("float32"))
        cells.obs["sample"] = noise.choice(["a", "b"], n)
        kind = Adversarial if adversarial else package.model.SCVI
        kind.setup_anndata(cells, batch_key="sample")
        model = kind(cells, n_hidden=width, n_latent=6, n_layers=2)
        plan = {"n_epochs_kl_warmup": None}
        if adversarial:
            plan |= {"adversarial_classifier": True, "scale_adversarial_loss": 1.0}
        model.train(
            accelerator="cpu",
            batch_size=batch,
            train_size=1.0,
            plan_kwargs=plan,
            callbacks=list(callbacks),
            **{"max_epochs": 1, **QUIET, "num_sanity_val_steps": 0, **options},
        )
        return model

    def losses(plan: Any, batch: Any) -> Forward:
        inference, generative, _ = plan.module(batch)
        reconstruction = -generative["px"].log_prob(batch["X"]).sum(-1)
        kl = torch.distributions.kl_divergence(inference["qz"], generative["pz"]).sum(-1)
        rest = None
        if adversarial:  # the classifier should take each sample for the other one
            chances = plan.adversarial_classifier(inference["z"]).log_softmax(1)
            rest = -chances.gather(1, 1 - batch["batch"].long()).mean()
        return Forward({"reconstruction": reconstruction.mean(), "kl": kl.mean()}, rest)

    return Project(
        ["scvi", "anndata"],
        {
            "tasks": {"reconstruction": "reconstruction_loss", "kl": "kl_local.kl_divergence_z"},
            "losses_from": "module.loss",
        },
        fit,
        losses,
        found="W = module.z_encoder.var_encoder.weight (6 × 32), heads: reconstruction → module.decoder, "
        "losses: from module.loss",
    )


# ---- chemprop --------------------------------------------------------------------------------------------------------


def _in_float64(batch: Any) -> Any:
    """Lightning does not look for tensors inside a BatchMolGraph."""
    batch.bmg.V, batch.bmg.E = batch.bmg.V.double(), batch.bmg.E.double()
    return batch


def chemprop(width: int = 32, batch: int = 8) -> Project:
    """A message-passing network with one head of three columns, whose criterion is a torchmetrics Metric."""
    tasks = ["solubility", "toxicity", "melting"]

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        L = import_lightning()
        from chemprop import data, models
        from chemprop import nn as layers

        molecules = ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "C1CCCCC1", "CC(C)C", "CCCl", "O=C=O"]
        noise = torch.Generator().manual_seed(0)
        targets = torch.randn(batch * steps, 3, generator=noise).numpy()
        points = [data.MoleculeDatapoint.from_smi(molecules[i % 8], y) for i, y in enumerate(targets)]
        batches = data.build_dataloader(data.MoleculeDataset(points), batch_size=batch, shuffle=False)
        if options.get("precision") == "64-true":
            collate = batches.collate_fn
            batches.collate_fn = lambda points: _in_float64(collate(points))
        head = layers.RegressionFFN(n_tasks=3, input_dim=width, hidden_dim=width)
        model = models.MPNN(layers.BondMessagePassing(d_h=width, depth=2), layers.MeanAggregation(), head)
        trainer(L, callbacks, **options).fit(model, batches)
        return model

    def losses(model: Any, batch: Any) -> Forward:
        error = model(batch.bmg, batch.V_d, batch.X_d) - batch.Y
        return Forward(dict(zip(tasks, error.square().mean(0), strict=True)))

    return Project(
        ["chemprop"],
        {
            "tasks": {task: f"T.{column}" for column, task in enumerate(tasks)},
            "losses_from": "predictor.criterion._calc_unreduced_loss",
        },
        fit,
        losses,
        coefficients=dict.fromkeys(tasks, 1 / 3),
        computes_in_float32=True,
        found="W = predictor.ffn.0.0.weight (32 × 32), heads: none, losses: from predictor.criterion._calc_unreduced_loss",
    )


# ---- neuromancer -----------------------------------------------------------------------------------------------------


def import_neuromancer() -> ModuleType:
    """Import it without wandb, which it needs for a logger that is not used here."""
    has_wandb = importlib.util.find_spec("wandb") is not None
    if not has_wandb:
        sys.modules["wandb"] = MagicMock()
    try:
        return importlib.import_module("neuromancer")
    finally:
        if not has_wandb:
            del sys.modules["wandb"]


def neuromancer(width: int = 32, batch: int = 8, limit: float = -3.0) -> Project:
    """An objective and a constraint, whose loss is 0 as long as it is satisfied. The default is violated in every step."""

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        L = import_lightning()
        nm = import_neuromancer()
        from neuromancer.problem import LitProblem

        net = nm.modules.blocks.MLP(2, 1, nonlin=nn.Tanh, hsizes=[width, width])
        x = nm.constraint.variable("x")
        cost = ((x - 2.0) ** 2.0).minimize(weight=1.0, name="cost")
        constraint = 10.0 * (x <= limit)
        constraint.name = "limit"
        loss = nm.loss.PenaltyLoss([cost], [constraint])
        problem = nm.problem.Problem([nm.system.Node(net, ["p"], ["x"], name="net")], loss)
        dataset = nm.dataset.DictDataset({"p": torch.randn(batch * steps, 2)}, name="train")
        batches = torch.utils.data.DataLoader(dataset, batch_size=batch, collate_fn=dataset.collate_fn)
        model = LitProblem(problem, custom_optimizer=torch.optim.Adam(problem.parameters(), lr=0.02))
        trainer(L, callbacks, **options).fit(model, batches)
        return model

    def losses(model: Any, batch: Any) -> Forward:
        x = model.problem.nodes[0].callable(batch["p"])
        return Forward({"cost": (x - 2).square().mean(), "limit": 10 * (x - limit).relu().mean()})

    return Project(
        ["neuromancer"],
        {
            "tasks": {"cost": "objective_loss", "limit": "penalty_loss"},
            "losses_from": "problem.loss",
        },
        fit,
        losses,
        found="W = problem.nodes.0.callable.linear.2.weight (1 × 32), heads: cost → problem.loss.objectives.0, "
        "limit → problem.loss.constraints.0.comparator, losses: from problem.loss",
    )


# ---- a VAE experiment ------------------------------------------------------------------------------------------------


def vae(width: int = 32, batch: int = 8) -> Project:
    """An experiment in `pytorch_lightning` that logs plain numbers and returns the sum of its losses."""

    def make(pl: ModuleType) -> Any:
        class VAE(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
                self.mu, self.log_var = nn.Linear(width, 4), nn.Linear(width, 4)
                self.decoder = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 20))

            def forward(self, x: Tensor) -> list[Tensor]:
                z = self.encoder(x)
                mu, log_var = self.mu(z), self.log_var(z)
                return [self.decoder(mu + torch.randn_like(mu) * (0.5 * log_var).exp()), x, mu, log_var]

            def reconstruction(self, y: Tensor, x: Tensor) -> Tensor:
                return F.mse_loss(y, x)

            def kl(self, mu: Tensor, log_var: Tensor) -> Tensor:
                return torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)

            def loss_function(self, y: Tensor, x: Tensor, mu: Tensor, log_var: Tensor) -> dict[str, Tensor]:
                reconstruction, kl = self.reconstruction(y, x), self.kl(mu, log_var)
                loss = reconstruction + 0.25 * kl
                return {"loss": loss, "Reconstruction_Loss": reconstruction.detach(), "KLD": -kl.detach()}

        class Experiment(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = VAE()

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                losses = self.model.loss_function(*self.model(batch[0]))
                self.log_dict({name: value.item() for name, value in losses.items()})
                return losses["loss"]

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=5e-3)

        return Experiment()

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        pl = import_lightning("pytorch_lightning")
        model = make(pl)
        trainer(pl, callbacks, **options).fit(model, loader(torch.randn(batch * steps, 20), size=batch))
        return model

    def losses(model: Any, batch: Any) -> Forward:
        y, x, mu, log_var = model.model(batch[0])
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)
        return Forward({"recon": (y - x).square().mean(), "kl": kl.mean()})

    return Project(
        ["pytorch_lightning"],
        {"tasks": ["recon", "kl"], "losses_from": {"recon": "model.reconstruction", "kl": "model.kl"}},
        fit,
        losses,
        coefficients={"recon": 1.0, "kl": 0.25},
        found="W = model.log_var.weight (4 × 32), heads: recon → model.decoder, "
        "losses: from model.reconstruction, model.kl",
    )


PROJECTS: Mapping[str, Callable[..., Project]] = {
    "BERT": bert,
    "BERT with LoRA": lambda **sizes: bert(lora=True, **sizes),
    "TFT": tft,
    "SCVI": scvi,
    "SCVI, adversarial": lambda **sizes: scvi(adversarial=True, **sizes),
    "chemprop": chemprop,
    "neuromancer": neuromancer,
    "neuralforecast": neuralforecast,
    "VAE experiment": vae,
}
