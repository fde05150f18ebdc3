//! Every rule that a schema's bounds cannot say, as CEL. The API server evaluates them, and so do
//! [`crate::manifest`] and the unit tests, without a cluster.
//!
//! A message names the fields and the fix; `fieldPath` points to the field that is easiest to change. It does not repeat
//! the numbers: an API server takes the length of `string(integer)` for unbounded and refuses a message with one as too
//! expensive (seen with 1.35). The arithmetic is the same as that of [`crate::MoEModelSpec::slots`] and [`crate::MoEModelSpec::gpus`]; a property
//! test compares them.
//!
//! kube-cel, which evaluates them here, knows neither `cel.bind` nor two-variable comprehensions nor `sortBy`
//! (it refuses the object, it never lets one pass): hence the repeated sums.

use kube::core::{Message, Rule};

/// Longest name of a model: `<model>-experts-1023` and the hash that Kubernetes appends to a StatefulSet's
/// revisions must fit into the 63 characters of a label.
const NAME_LENGTH: usize = 40;

fn rule(rule: &str, message: &str) -> Rule {
    Rule::new(rule).message(message)
}

/// A rule whose message is an expression.
fn told(rule: impl Into<String>, message: impl Into<String>) -> Rule {
    Rule::new(rule).message(Message::Expression(message.into()))
}

/// The object's name, from which every child's name is made.
pub(crate) fn model_name() -> Rule {
    told(
        format!(
            "size(self.metadata.name) <= {NAME_LENGTH} && self.metadata.name.matches('{}')",
            crate::schema::LABEL
        ),
        format!(
            "'metadata.name ' + self.metadata.name + ': the names of Services and pods are made from it, so it has at \
             most {NAME_LENGTH} lower-case letters, digits and hyphens and starts with a letter'"
        ),
    )
}

/// A model that is Ready has the experts of its checkpoint: another number means another checkpoint. One that
/// is not Ready may have been given a wrong number, which must be correctable.
pub(crate) fn served_experts() -> Rule {
    rule(
        "self.spec.model.routedExperts == oldSelf.spec.model.routedExperts \
         || self.spec.model.source != oldSelf.spec.model.source \
         || (has(self.spec.model.source.image) && (has(self.spec.image) ? self.spec.image : '') != (has(oldSelf.spec.image) ? oldSelf.spec.image : '')) \
         || !has(oldSelf.status) || !has(oldSelf.status.conditions) \
         || !oldSelf.status.conditions.exists(c, c.type == 'Ready' && c.status == 'True')",
        "the model is Ready with other routedExperts: change them together with the checkpoint (model.source, or image if \
         the source is the image)",
    )
    .field_path(".spec.model.routedExperts")
}

/// Slots, copies, shards and budget.
pub(crate) fn model_spec() -> Vec<Rule> {
    const SLOTS: &str = "(self.model.routedExperts + self.experts.redundantSlots)";
    let gpus = [
        "self.prefill.replicas; self.prefill",
        "self.decode.replicas; self.decode",
        "self.experts.shards; self.experts",
    ]
    .map(|tier| tier.split_once("; ").unwrap_or_default())
    .map(|(pods, tier)| format!("(has({tier}.accelerator) ? {pods} * {tier}.accelerator.count : 0)"))
    .join(" + ");
    vec![
        rule(
            &format!("{SLOTS} >= self.model.routedExperts * self.experts.minCopies"),
            "too few slots for minCopies: redundantSlots is at least routedExperts x (minCopies - 1)",
        )
        .field_path(".experts.redundantSlots"),
        rule(
            &format!("{SLOTS} % self.experts.shards == 0"),
            "the slots of a layer, routedExperts + redundantSlots, do not divide among the shards: choose a number of \
             shards that divides them, or change redundantSlots to the next multiple of shards less routedExperts",
        )
        .field_path(".experts.shards"),
        rule(
            "self.experts.minCopies <= self.experts.shards",
            "copies are on different shards: minCopies needs at least as many shards",
        )
        .field_path(".experts.minCopies"),
        rule(
            "self.experts.redundantSlots <= self.model.routedExperts * (self.experts.shards - 1)",
            "a shard holds an expert once: redundantSlots is at most routedExperts x (shards - 1)",
        )
        .field_path(".experts.redundantSlots"),
        rule(
            &format!("!has(self.budget) || {gpus} <= self.budget.gpus"),
            "prefill, decode and experts need more accelerators (pods x accelerator.count) than the budget has: raise \
             budget.gpus or lower replicas, shards or accelerator.count",
        )
        .field_path(".budget.gpus"),
        rule(
            "self.model.numerics != 'CudaFp8' || (self.prefill.replicas == 0 || has(self.prefill.accelerator)) \
             && (self.decode.replicas == 0 || has(self.decode.accelerator)) && has(self.experts.accelerator)",
            "CudaFp8 is computed on accelerators only: give prefill, decode and experts an accelerator, or choose another numerics \
             class",
        )
        .field_path(".model.numerics"),
    ]
}

/// One process has one number of threads.
pub(crate) fn experts() -> Vec<Rule> {
    vec![
        rule(
            "!has(self.worker) || !has(self.limits) || !has(self.limits.threads)",
            "shard and worker are one process: give its threads in worker.limits.threads",
        )
        .field_path(".limits.threads"),
    ]
}

/// What a process can compute on.
pub(crate) fn accelerator() -> Vec<Rule> {
    vec![
        rule(
            "self.resource.startsWith('nvidia.com/')",
            "processes compute on NVIDIA's GPUs or on the CPU: name a resource of nvidia.com (nvidia.com/gpu), or remove \
             accelerator",
        )
        .field_path(".resource"),
        rule(
            "self.count == 1",
            "a process computes on one accelerator: count is 1; more of them are more replicas or shards",
        )
        .field_path(".count"),
    ]
}

/// One source, not none and not two.
pub(crate) fn source() -> Vec<Rule> {
    vec![rule(
        "[has(self.image), has(self.persistentVolumeClaim), has(self.hostPath), has(self.imageVolume)].exists_one(given, given)",
        "give exactly one of image, persistentVolumeClaim, hostPath, imageVolume",
    )]
}

/// A folder of a container or node.
pub(crate) fn absolute_path() -> Vec<Rule> {
    vec![rule(
        "self.startsWith('/') && !self.split('/').exists(part, part == '..')",
        "the path is absolute (/models/NAME) and has no part '..'",
    )]
}

/// A folder of a volume.
pub(crate) fn relative_path() -> Vec<Rule> {
    vec![rule(
        "!self.startsWith('/') && !self.split('/').exists(part, part == '..')",
        "the path is relative to the root of the volume (models/NAME) and has no part '..'",
    )]
}

/// A cache that holds something.
pub(crate) fn kv_cache() -> Vec<Rule> {
    vec![rule(
        "quantity(string(self)).compareTo(quantity('1Mi')) >= 0",
        "the KV cache has at least 1Mi (512Mi, 16Gi)",
    )]
}

/// CPU and memory, nothing else: accelerators have a field of their own.
pub(crate) fn quantities() -> Vec<Rule> {
    vec![rule(
        "self.all(name, name == 'cpu' || name == 'memory')",
        "only cpu and memory; accelerators belong into the tier's accelerator field",
    )]
}

/// What Kubernetes would refuse at the pod.
pub(crate) fn resources() -> Vec<Rule> {
    ["cpu", "memory"]
        .map(|name| {
            rule(
                &format!(
                    "!has(self.requests) || !has(self.limits) || !('{name}' in self.requests) || !('{name}' in self.limits) \
                     || quantity(string(self.requests['{name}'])).compareTo(quantity(string(self.limits['{name}']))) <= 0"
                ),
                &format!("requests.{name} is more than limits.{name}: raise the limit or lower the request"),
            )
            .field_path(".limits")
        })
        .to_vec()
}

/// Keys are names; a schema cannot bound the keys of a map.
pub(crate) fn annotations() -> Vec<Rule> {
    vec![rule(
        "self.all(key, !format.qualifiedName().validate(key).hasValue() && !key.startsWith('cadre.dev/'))",
        "a key is an annotation's name (example.com/name) and none of cadre's own (cadre.dev/…)",
    )]
}

/// Keys are labels; a schema cannot bound the keys of a map.
pub(crate) fn node_selector() -> Vec<Rule> {
    vec![rule(
        "self.all(key, !format.qualifiedName().validate(key).hasValue())",
        "a key is a node label (kubernetes.io/arch, example.com/pool)",
    )]
}

/// What Kubernetes would refuse at the pod.
pub(crate) fn toleration() -> Vec<Rule> {
    vec![
        rule(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "operator Exists takes no value: remove value, or use operator Equal",
        ),
        rule(
            "has(self.key) && self.key != '' || has(self.operator) && self.operator == 'Exists'",
            "without a key the operator is Exists: it tolerates every taint",
        ),
        rule(
            "!has(self.tolerationSeconds) || has(self.effect) && self.effect == 'NoExecute'",
            "tolerationSeconds goes with effect NoExecute",
        ),
    ]
}

/// A peer of a NetworkPolicy, as Kubernetes wants it.
pub(crate) fn peer() -> Vec<Rule> {
    vec![rule(
        "has(self.ipBlock) ? !has(self.podSelector) && !has(self.namespaceSelector) : has(self.podSelector) || has(self.namespaceSelector)",
        "give ipBlock, or podSelector and namespaceSelector, of which one may be absent",
    )]
}

/// Fields of a Service that only some types have.
pub(crate) fn service() -> Vec<Rule> {
    vec![
        rule(
            "!has(self.loadBalancerClass) || self.type == 'LoadBalancer'",
            "loadBalancerClass goes with type LoadBalancer",
        )
        .field_path(".loadBalancerClass"),
        rule(
            "!has(self.externalTrafficPolicy) || self.type != 'ClusterIP'",
            "externalTrafficPolicy goes with type NodePort or LoadBalancer",
        )
        .field_path(".externalTrafficPolicy"),
    ]
}

/// A variable of the user's.
pub(crate) fn variable() -> Vec<Rule> {
    vec![
        rule(
            "!self.name.startsWith('CADRE_')",
            "names that begin with CADRE_ are cadre's own: use the field of the spec that sets it",
        )
        .field_path(".name"),
        rule("has(self.value) != has(self.valueFrom)", "give exactly one of value and valueFrom"),
    ]
}

/// One source, not none and not two.
pub(crate) fn variable_source() -> Vec<Rule> {
    vec![rule(
        "[has(self.configMapKeyRef), has(self.secretKeyRef), has(self.fieldRef)].exists_one(given, given)",
        "give exactly one of configMapKeyRef, secretKeyRef, fieldRef",
    )]
}

/// A volume of the user's.
pub(crate) fn volume() -> Vec<Rule> {
    vec![
        rule(
            "[has(self.emptyDir), has(self.configMap), has(self.secret), has(self.persistentVolumeClaim), has(self.hostPath)].exists_one(given, given)",
            "give exactly one of emptyDir, configMap, secret, persistentVolumeClaim, hostPath",
        ),
        rule(
            "!(self.name in ['checkpoint', 'layout', 'cluster-secret'])",
            "checkpoint, layout and cluster-secret are the operator's own volumes: choose another name",
        )
        .field_path(".name"),
    ]
}

/// A place for a volume that hides nothing of the operator's.
pub(crate) fn mount_path() -> Vec<Rule> {
    vec![
        rule(
            "self.startsWith('/') && self != '/' && !self.contains(':') && !self.split('/').exists(part, part == '..')",
            "the path is absolute (/dev/shm), not the root, and has neither ':' nor a part '..'",
        ),
        rule(
            "!['/checkpoint', '/etc/cadre', '/dev/termination-log'].exists(own, self == own || self.startsWith(own + '/') || own.startsWith(self + '/'))",
            "the operator mounts its own under /checkpoint, /etc/cadre and /dev/termination-log: choose another path",
        ),
    ]
}

/// A rule of spreading, as Kubernetes wants it.
pub(crate) fn spread() -> Vec<Rule> {
    vec![
        rule(
            "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
            "minDomains goes with whenUnsatisfiable DoNotSchedule",
        )
        .field_path(".minDomains"),
    ]
}

/// The name under which the operator looks for it.
pub(crate) fn tier_name() -> Rule {
    told(
        "self.metadata.name == self.spec.modelName + '-' + self.spec.tier.lowerAscii()",
        "'the operator makes this object and names it ' + self.spec.modelName + '-' + self.spec.tier.lowerAscii() + \
         '; no other name has an effect'",
    )
}

/// A model has at least one shard.
pub(crate) fn tier_spec() -> Vec<Rule> {
    vec![
        rule(
            "self.tier != 'Experts' || self.replicas >= 1",
            "experts need at least 1 replica: they hold the weights",
        )
        .field_path(".replicas"),
    ]
}

/// A field that is set once.
pub(crate) fn immutable(field: &str) -> Vec<Rule> {
    vec![rule("self == oldSelf", &format!("{field} is immutable: the operator makes a tier for each model"))]
}
