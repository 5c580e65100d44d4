"""The papers that the recipes come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Authors, year and title; ``link`` is an arXiv number, or the venue where there is none.

    ``year`` is that of publication at the venue, as formats cite it; of a preprint alone its own.
    """

    authors: str
    year: int
    title: str
    link: str

    def __str__(self) -> str:
        return f"{self.authors} ({self.year}): {self.title}. {self.link}."


SVD = Paper(
    "Ben Noach, Goldberg",
    2020,
    "Compressing Pre-trained Language Models by Matrix Decomposition",
    "AACL 2020",
)
SVD_LLM = Paper(
    "Wang, Zheng, Wan, Zhang",
    2025,
    "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    "arXiv:2403.07378",
)
DRONE = Paper(
    "Chen, Yu, Dhillon, Hsieh",
    2021,
    "DRONE: Data-aware Low-rank Compression for Large NLP Models",
    "NeurIPS 2021",
)
ASVD = Paper(
    "Yuan, Shang, Song, Wu, Yan, Sun",
    2023,
    "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    "arXiv:2312.05821",
)
FWSVD = Paper(
    "Hsu, Hua, Chang, Lou, Shen, Jin",
    2022,
    "Language model compression with weighted low-rank factorization",
    "arXiv:2207.00112",
)
PIFA = Paper(
    "Zhao, Zhang, Cannistraci",
    2025,
    "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for Efficient Inference"
    " in Large Language Models",
    "arXiv:2501.19090",
)
ESPACE = Paper(
    "Sakr, Khailany",
    2024,
    "ESPACE: Dimensionality Reduction of Activations for Model Compression",
    "arXiv:2410.05437",
)
KRONECKER_GPT = Paper(
    "Edalati, Tahaei, Rashid, Partovi Nia, Clark, Rezagholizadeh",
    2022,
    "Kronecker Decomposition for GPT Compression",
    "arXiv:2110.08152",
)
KRONECKER_BERT = Paper(
    "Tahaei, Charlaix, Partovi Nia, Ghodsi, Rezagholizadeh",
    2022,
    "KroneckerBERT: Learning Kronecker Decomposition for Pre-trained Language Models via Knowledge "
    "Distillation",
    "arXiv:2109.06243",
)
MONARCH = Paper(
    "Dao, Chen, Sohoni, Desai, Poli, Grogan, Liu, Rao, Rudra, Ré",
    2022,
    "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    "arXiv:2204.00595",
)
BUTTERFLY = Paper(
    "Dao, Gu, Eichhorn, Rudra, Ré",
    2019,
    "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations",
    "arXiv:1903.05895",
)
BTT = Paper(
    "Qiu, Potapczynski, Finzi, Goldblum, Wilson",
    2024,
    "Compute Better Spent: Replacing Dense Layers with Structured Matrices",
    "arXiv:2406.06248",
)
MPO = Paper(
    "Liu, Gao, Zhao, Xie, Lu, Wen",
    2021,
    "Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression based on Matrix "
    "Product Operators",
    "arXiv:2106.02205",
)
TT_GPT2 = Paper(
    "Chekalina, Novikov, Gusak, Oseledets, Panchenko",
    2023,
    "Efficient GPT Model Pre-training using Tensor Train Matrix Representation",
    "arXiv:2306.02697",
)
TT_EMBEDDING = Paper(
    "Hrinchuk, Khrulkov, Mirvakhabova, Orlova, Oseledets",
    2020,
    "Tensorized Embedding Layers",
    "arXiv:1901.10787",
)
TENSORGPT = Paper(
    "Xu, Xu, Mandic",
    2023,
    "TensorGPT: Efficient Compression of the Embedding Layer in LLMs based on the Tensor-Train Decomposition",
    "arXiv:2307.00526",
)
GROUP_REDUCE = Paper(
    "Chen, Si, Li, Chelba, Hsieh",
    2018,
    "GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model Shrinking",
    "arXiv:1806.06950",
)
BASIS_SHARING = Paper(
    "Wang, Chen, Lin, Li, Zhang",
    2025,
    "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
    "arXiv:2410.03765",
)
ALBERT = Paper(
    "Lan, Chen, Goodman, Gimpel, Sharma, Soricut",
    2020,
    "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
    "arXiv:1909.11942",
)
EXTREME = Paper(
    "Wang, Ren, Shang, Jiang, Liu",
    2022,
    "Exploring Extreme Parameter Compression for Pre-trained Language Models",
    "arXiv:2205.10036",
)
TENSORIZED_TRANSFORMER = Paper(
    "Ma, Zhang, Zhang, Duan, Hou, Song, Zhou",
    2019,
    "A Tensorized Transformer for Language Modeling",
    "arXiv:1906.09777",
)
TUFORMER = Paper(
    "Liu, Su, Huang",
    2022,
    "Tuformer: Data-driven Design of Transformers for Improved Generalization or Efficiency",
    "ICLR 2022",
)
HYPOFORMER = Paper(
    "Li, Zhang, Gan, Lv, Wang, Wei, Jiang",
    2022,
    "Hypoformer: Hybrid Decomposition Transformer for Edge-friendly Neural Machine Translation",
    "EMNLP 2022",
)
LOSPARSE = Paper(
    "Li, Yu, Zhang, Liang, He, Chen, Zhao",
    2023,
    "LoSparse: Structured Compression of Large Language Models based on Low-Rank and Sparse Approximation",
    "arXiv:2306.11222",
)
CP = Paper(
    "Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky",
    2015,
    "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
    "arXiv:1412.6553",
)
