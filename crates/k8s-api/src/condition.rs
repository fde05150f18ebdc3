//! Conditions and their reasons: closed sets, each reason with its meaning and its fix. docs/operations.md is
//! generated from here.

/// A condition of a model (and `ScalingLimited` of a tier).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// The model answers requests: the router serves and at least one worker of each role it needs is routable
    /// and every expert is covered.
    Ready,
    /// The operator or the cluster is still on the way to the spec.
    Progressing,
    /// The model is less than the spec asks for: a pod is missing, failed or cannot be made.
    Degraded,
    /// Every expert of every layer has a routable copy; false or at risk names the first that has not.
    ExpertsCovered,
    /// A tier gets another number of pods than asked for, because of the budget or the number of slots.
    ScalingLimited,
}

impl ConditionType {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 5] =
        [Self::Ready, Self::Progressing, Self::Degraded, Self::ExpertsCovered, Self::ScalingLimited];

    /// What it says when its status is True.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Ready => {
                "The model answers requests: the router serves, a worker of each role that it needs is routable, and every expert is covered."
            }
            Self::Progressing => "The operator or the cluster is still on the way to the spec.",
            Self::Degraded => {
                "The model is less than the spec asks for: a pod is missing, failed or cannot be made."
            }
            Self::ExpertsCovered => {
                "Every expert of every layer has as many routable copies as the spec asks for. False names the first that has none or too few."
            }
            Self::ScalingLimited => {
                "A tier gets another number of pods than asked for, because of the budget or of the number of slots."
            }
        }
    }

    /// The status of a model that is as it should be.
    pub fn healthy(self) -> &'static str {
        match self {
            Self::Ready | Self::ExpertsCovered => "True",
            Self::Progressing | Self::Degraded | Self::ScalingLimited => "False",
        }
    }

    /// The `type` of the condition.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Progressing => "Progressing",
            Self::Degraded => "Degraded",
            Self::ExpertsCovered => "ExpertsCovered",
            Self::ScalingLimited => "ScalingLimited",
        }
    }
}

macro_rules! reasons {
    ($($(#[doc = $meaning:literal])+ fix: $fix:literal, $name:ident;)+) => {
        /// Why a condition has its status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[doc = $meaning])+ $name,)+
        }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The `reason` of the condition.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What it means.
            pub fn meaning(self) -> &'static str {
                // The text of a doc comment begins with the blank after `///`.
                match self { $(Self::$name => concat!($($meaning),+),)+ }.trim_start()
            }

            /// What to do about it.
            pub fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)+ }
            }
        }
    };
}

reasons! {
    /// All is as the spec says.
    fix: "Nothing to do.", AsSpecified;
    /// Children are being created or their pods start.
    fix: "Wait; `kubectl get moetier` shows which tier is behind.", Starting;
    /// Shards read their weights.
    fix: "Wait; `kubectl get moe -o wide` shows the progress.", LoadingWeights;
    /// A tier is being scaled, or a new placement of the experts is being prepared beside the one in force.
    fix: "Wait; requests are served meanwhile.", Scaling;
    /// Pods are being replaced by pods of a new image or template.
    fix: "Wait; pods drain for up to `drainSeconds` each.", Updating;
    /// The model is being deleted.
    fix: "Wait; pods drain for up to `drainSeconds`.", Deleting;
    /// The router's pod is not ready.
    fix: "Look at the pod named in the message: `kubectl logs`, `kubectl describe pod`.", RouterUnavailable;
    /// The router is ready by its pod but does not answer the operator.
    fix: "Look at the router's log and at network policies between the operator's namespace and port 50050.",
    CoordinatorUnreachable;
    /// No decode worker is routable.
    fix: "Look at the decode pods; scale the tier above 0.", NoDecodeWorker;
    /// Prefill workers are wanted and none is routable.
    fix: "Look at the prefill pods.", NoPrefillWorker;
    /// An expert has no routable copy; the message names it and its layer.
    fix: "Look at the shard pods named in the message; with `minCopies: 2` one lost shard uncovers nothing.",
    ExpertUncovered;
    /// An expert has fewer routable copies than `minCopies`, or all of them in one failure domain.
    fix: "Wait for the missing shard; copies that ended up in one domain move apart by themselves. If they cannot, give \
          the shards more failure domains (`spreadBy`).", ExpertAtRisk;
    /// The coordinator has not reported yet.
    fix: "Wait; if it lasts, see RouterUnavailable.", CoverageUnknown;
    /// Fewer pods are routable than wanted.
    fix: "Look at the pods named in the message.", PodsMissing;
    /// A container ends again and again; the message has its last words.
    fix: "Read the message; `kubectl logs --previous` has more.", PodsCrashing;
    /// A process refuses its flags, or a field of the spec has no usable value; the message names it.
    fix: "Correct the field; if it is none of yours, use an image of the operator's version.", InvalidConfiguration;
    /// The image of a container cannot be pulled.
    fix: "Correct `spec.image` or add `spec.imagePullSecrets`.", ImagePullFailed;
    /// The checkpoint is corrupt or incomplete; the message names the file and the tensor or field.
    fix: "Repair the checkpoint; `cadre inspect DIR` names everything that is wrong with it.", CheckpointInvalid;
    /// The checkpoint is not the one that the spec describes, or pods see different ones.
    fix: "Correct `spec.model.routedExperts` or the checkpoint; all pods must see the same files.", CheckpointMismatch;
    /// The folder of the checkpoint cannot be read.
    fix: "Correct the path in `spec.model.source`; user 65532 must be able to read it.", CheckpointUnreadable;
    /// The claim named by the spec does not exist.
    fix: "Create the claim or correct `spec.model.source.persistentVolumeClaim.claimName`.", ClaimNotFound;
    /// The claim exists and is not bound.
    fix: "See `kubectl describe pvc`; the storage class must provide a volume.", ClaimNotBound;
    /// A volume cannot be mounted.
    fix: "The message is the kubelet's; correct `spec.model.source`.", VolumeMountFailed;
    /// No node has enough of the accelerator.
    fix: "Add nodes, free accelerators or scale down; `kubectl describe pod` has the scheduler's count.",
    InsufficientAccelerators;
    /// No node has enough CPU or memory.
    fix: "Add nodes or lower `resources.requests`.", InsufficientResources;
    /// No node matches the node selector or tolerates the taints.
    fix: "Label a node, or correct `nodeSelector` and `tolerations` of the tier.", NodeSelectorUnmatched;
    /// A node that runs shards lacks the label of `spreadBy`: copies cannot be kept apart there.
    fix: "Label the node, or choose a `spreadBy` that every node of the shards has.", FailureDomainUnknown;
    /// The scheduler has another reason; the message has it.
    fix: "See the message.", Unschedulable;
    /// The spec asks for something of the nodes or the cluster that the operator's configuration does not allow.
    fix: "Leave it out, or ask whoever runs the operator to allow it: the chart's values `models.allow` (docs/operations.md).",
    NotAllowed;
    /// The router has members, and routes to them, that are none of the model's pods.
    fix: "Somebody joined a process to the model: find it by the address in the message, and see that the NetworkPolicies are \
          enforced and that nobody else can read the model's Secret.", UnknownMember;
    /// The namespace refuses the pods (pod security, quota, limit range, a policy).
    fix: "The message is the API server's; use a namespace that admits restricted pods, or raise the quota.",
    PodsForbidden;
    /// A container was killed for using more memory than its limit.
    fix: "Raise `resources.limits.memory` of the tier; `cadre inspect` prints what a shard needs.", OutOfMemory;
    /// A container with an accelerator finds no NVIDIA driver, or one that is too old for the kernels.
    fix: "Install a driver of CUDA 13.0 or newer and NVIDIA's container toolkit on the nodes; where their default runtime is \
          another, set `runtimeClassName` of the tier (docs/operations.md, GPU nodes).", AcceleratorDriverMissing;
    /// The driver shows a container no accelerator.
    fix: "See that the device plugin runs on the node and gives the resource of `accelerator`, and that `env` of the tier \
          does not set NVIDIA_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES.", AcceleratorNotFound;
    /// There are no kernels for the accelerator of the node.
    fix: "Place the tier on nodes with an H100 or H200: `nodeSelector: {nvidia.com/gpu.product: NVIDIA-H200}`.",
    AcceleratorUnsupported;
    /// The image cannot compute on an accelerator: it has no kernels, those of another build, or a static binary.
    fix: "Use the image that `cargo xtask image --cuda` writes: `spec.image`, or the chart's `image.tag` for all models.",
    AcceleratorUnsupportedByImage;
    /// Weights and caches do not fit into the accelerator's memory; the message says what was asked and what is free.
    fix: "More shards, or a smaller `kvCache`; see with `nvidia-smi` that nobody else uses the card. `cadre inspect` prints \
          what a shard and a worker need.", AcceleratorOutOfMemory;
    /// The API server refused a child; the message has its words.
    fix: "The message is the API server's.", ChildRefused;
    /// A child of the wanted name belongs to somebody else.
    fix: "Rename the model, or remove the object named in the message.", NameTaken;
    /// A tier would exceed `spec.budget.gpus`.
    fix: "Raise the budget or scale another tier down.", BudgetExceeded;
    /// The slots do not divide evenly among the wanted shards.
    fix: "Choose a number of shards that divides routedExperts + redundantSlots.", SlotsNotDivisible;
    /// The shards asked for are too few for the copies: a shard holds an expert once.
    fix: "Scale the experts to at least the number in the message.", TooFewShards;
    /// Nothing limits the tiers.
    fix: "Nothing to do.", NotLimited;
}
