"""The ops of a sparse autoencoder: dense mathematics in `reference`, lean PyTorch in `eager`."""

from fastsae_kernels._dispatch import Impl as Impl
from fastsae_kernels._row_grads import DenseGrad as DenseGrad
from fastsae_kernels._row_grads import RowGrad as RowGrad
from fastsae_kernels._row_grads import collect_row_grads as collect_row_grads
from fastsae_kernels._row_grads import release_row_grads as release_row_grads
from fastsae_kernels._workspace import DEFAULT_WORKSPACE as DEFAULT_WORKSPACE
from fastsae_kernels._workspace import release_scratch as release_scratch
from fastsae_kernels._workspace import workspace as workspace
from fastsae_kernels.auxk import aux_topk as aux_topk
from fastsae_kernels.batch_topk import batch_topk_encode as batch_topk_encode
from fastsae_kernels.code import LatentGroups as LatentGroups
from fastsae_kernels.code import RaggedCode as RaggedCode
from fastsae_kernels.code import SparseCode as SparseCode
from fastsae_kernels.decode import sparse_decode as sparse_decode
from fastsae_kernels.grouping import group_by_latent as group_by_latent
from fastsae_kernels.loss import MSEL1 as MSEL1
from fastsae_kernels.loss import mse_l1_loss as mse_l1_loss
from fastsae_kernels.optimizer import lazy_row_adam as lazy_row_adam
from fastsae_kernels.optimizer import row_adam as row_adam
from fastsae_kernels.optimizer import row_grad_norm as row_grad_norm
from fastsae_kernels.threshold import JumpReLUCode as JumpReLUCode
from fastsae_kernels.threshold import ReLUL1 as ReLUL1
from fastsae_kernels.threshold import jumprelu_encode as jumprelu_encode
from fastsae_kernels.threshold import relu_l1_loss as relu_l1_loss
from fastsae_kernels.threshold import threshold_encode as threshold_encode
from fastsae_kernels.topk import topk_encode as topk_encode
