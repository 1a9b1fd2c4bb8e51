"""The smallest detectors: on the V-MoE of an e2e that starts from scratch, and fresh ones."""

from m2mkd_jax.config.defaults import base


def get_config():
    config = base()
    config.name = "tiny_detect"
    config.family = "vmoe"
    config.phases = ("e2e_scratch", "detect", "detect_scratch", "eval")
    data = config.data
    data.name, data.image_size, data.classes = "digits", 32, 10
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    data.train_images, data.test_images = 32, 20
    vmoe = config.vmoe
    vmoe.patch, vmoe.width, vmoe.heads = 16, 16, 2
    vmoe.depths, vmoe.experts = (1, 1), 2  # all blocks alike: a scan of one body
    recipe = config.recipes.e2e
    recipe.epochs, recipe.batch, recipe.lr_per, recipe.lr = 1, 16, 0, 1e-3
    recipe.mixup = recipe.cutmix = 0.0  # drawing from Beta takes long to compile
    config.evaluation.batch = 20

    detection = config.detection
    detection.network = "e2e_scratch"
    detection.evaluation_batch, detection.pictures = 4, 2
    scenes = detection.data
    scenes.name, scenes.classes, scenes.image_size = "digits_scene", 10, 64
    scenes.mean, scenes.std = data.mean, data.std
    scenes.train_images, scenes.test_images, scenes.objects = 16, 6, 4
    scenes.augment.resize, scenes.augment.scale = "jitter", (0.7, 1.3)
    scenes.augment.flip = False
    model = detection.model
    model.window, model.relative_positions = 2, True
    model.channels, model.anchor_sizes = 8, (8, 16, 32, 64, 128)
    model.rpn_budget, model.roi_budget, model.fc_width = 16, 16, 16
    model.pre_nms, model.post_nms, model.detections = (16, 16), (16, 16), 5
    model.score_threshold = 0.01
    train = detection.recipe
    train.epochs, train.batch, train.lr, train.lr_per = 3, 4, 1e-3, 0
    train.accumulate, train.clip, train.drop_path = 2, 1.0, 0.1
    train.warmup_epochs, train.milestones = 0.5, (2.0,)
    config.log_every, config.evaluation.every = 2, 2.0
    return config
