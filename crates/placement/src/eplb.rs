//! EPLB as published (spec §9): the yardstick that every other plan is measured against.
//!
//! Weights are F32 and sums run in the published order, so that near-ties fall as they do there. Ties go
//! to the lowest index. Differences are of form alone: names are spelt out, the map from logical to
//! physical is ragged instead of padded with −1, and bad shapes and weights are typed errors.
//! EPLB may put two copies of an expert on one GPU, which balances load but protects nothing; the
//! planner in [`crate::plan`] does not.

/// Where items went: item `i` is the `rank[i]`-th of pack `pack[i]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Pack per item.
    pub pack: Vec<usize>,
    /// Place inside the pack per item.
    pub rank: Vec<usize>,
}

/// Which logical expert each physical expert copies, in the order in which copies were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// Logical expert per physical expert.
    pub physical_to_logical: Vec<usize>,
    /// Which copy of its logical expert each physical expert is, from 0.
    pub rank: Vec<usize>,
    /// Copies per logical expert.
    pub logical_count: Vec<usize>,
}

/// The expert map of one layer. Physical experts are numbered GPU by GPU, `num_replicas / num_gpus` each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap {
    /// Logical expert per physical expert, `[num_replicas]`.
    pub physical_to_logical: Vec<usize>,
    /// Physical experts per logical expert, by copy: `[num_experts][logical_count]`.
    pub logical_to_physical: Vec<Vec<usize>>,
    /// Copies per logical expert, `[num_experts]`.
    pub logical_count: Vec<usize>,
}

/// The cluster that [`rebalance_experts`] plans for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterShape {
    /// Physical experts per layer.
    pub num_replicas: usize,
    /// Expert groups of the gate.
    pub num_groups: usize,
    /// Server nodes.
    pub num_nodes: usize,
    /// GPUs over all nodes.
    pub num_gpus: usize,
}

/// Packs `n` weighted items into `num_packs` packs of exactly `n / num_packs` items: heaviest first, each
/// into the lightest pack that still has room. With one item per pack, item `i` is pack `i`.
pub fn balanced_packing(weight: &[f32], num_packs: usize) -> Result<Packing, EplbError> {
    check_weights(weight)?;
    let room = divide("balanced_packing", "items", weight.len(), "packs", num_packs)?;
    if room == 1 {
        return Ok(Packing { pack: (0..weight.len()).collect(), rank: vec![0; weight.len()] });
    }
    let mut packing = Packing { pack: vec![0; weight.len()], rank: vec![0; weight.len()] };
    let mut pack_weight = vec![0f32; num_packs];
    let mut pack_items = vec![0usize; num_packs];
    let mut heaviest_first: Vec<usize> = (0..weight.len()).collect();
    heaviest_first.sort_by(|&a, &b| weight[b].total_cmp(&weight[a]));
    for item in heaviest_first {
        let pack = (0..num_packs)
            .filter(|&pack| pack_items[pack] < room)
            .min_by(|&a, &b| pack_weight[a].total_cmp(&pack_weight[b]))
            .expect("packs have room for exactly as many items as there are");
        packing.pack[item] = pack;
        packing.rank[item] = pack_items[pack];
        pack_items[pack] += 1;
        pack_weight[pack] += weight[item];
    }
    Ok(packing)
}

/// Replicates `n` logical experts to `num_physical`: one copy each, then each further one to the expert
/// with the largest weight per copy.
pub fn replicate_experts(weight: &[f32], num_physical: usize) -> Result<Replication, EplbError> {
    check_weights(weight)?;
    if weight.is_empty() || num_physical < weight.len() {
        return Err(EplbError::TooFewReplicas { replicas: num_physical, experts: weight.len() });
    }
    let mut replication = Replication {
        physical_to_logical: (0..weight.len()).collect(),
        rank: vec![0; weight.len()],
        logical_count: vec![1; weight.len()],
    };
    for _ in weight.len()..num_physical {
        let share = |expert: usize| weight[expert] / replication.logical_count[expert] as f32;
        let hottest = argmax(weight.len(), share);
        replication.physical_to_logical.push(hottest);
        replication.rank.push(replication.logical_count[hottest]);
        replication.logical_count[hottest] += 1;
    }
    Ok(replication)
}

/// Plans every layer of `weight [layers][num_experts]`: hierarchically (groups to nodes, copies inside a
/// node, copies to the node's GPUs) if groups divide over nodes, else globally.
pub fn rebalance_experts(weight: &[Vec<f32>], shape: ClusterShape) -> Result<Vec<ExpertMap>, EplbError> {
    let hierarchical = shape.num_nodes > 0 && shape.num_groups.is_multiple_of(shape.num_nodes);
    let shape = if hierarchical { shape } else { ClusterShape { num_groups: 1, num_nodes: 1, ..shape } };
    weight.iter().map(|layer| rebalance_layer(layer, shape)).collect()
}

/// One layer. "Node order" numbers logical experts node by node, group by group.
fn rebalance_layer(weight: &[f32], shape: ClusterShape) -> Result<ExpertMap, EplbError> {
    const OP: &str = "rebalance_experts";
    let group_size = divide(OP, "experts", weight.len(), "groups", shape.num_groups)?;
    let groups_per_node = divide(OP, "groups", shape.num_groups, "nodes", shape.num_nodes)?;
    let gpus_per_node = divide(OP, "gpus", shape.num_gpus, "nodes", shape.num_nodes)?;
    let per_gpu = divide(OP, "replicas", shape.num_replicas, "gpus", shape.num_gpus)?;

    let group_weight: Vec<f32> = weight.chunks(group_size).map(|group| group.iter().sum()).collect();
    let groups = balanced_packing(&group_weight, shape.num_nodes)?;
    let mut node_order = vec![0; weight.len()];
    for expert in 0..weight.len() {
        let (group, member) = (expert / group_size, expert % group_size);
        let place = groups.pack[group] * groups_per_node + groups.rank[group];
        node_order[place * group_size + member] = expert;
    }

    let mut map = ExpertMap {
        physical_to_logical: vec![0; shape.num_replicas],
        logical_to_physical: vec![Vec::new(); weight.len()],
        logical_count: vec![0; weight.len()],
    };
    let replicas_per_node = per_gpu * gpus_per_node;
    for (node, experts) in node_order.chunks(group_size * groups_per_node).enumerate() {
        let tokens: Vec<f32> = experts.iter().map(|&expert| weight[expert]).collect();
        let copies = replicate_experts(&tokens, replicas_per_node)?;
        let share: Vec<f32> = copies
            .physical_to_logical
            .iter()
            .map(|&local| tokens[local] / copies.logical_count[local] as f32)
            .collect();
        let gpus = balanced_packing(&share, gpus_per_node)?;
        // Copies of an expert appear in the order of their rank, so pushing keeps that order.
        for (copy, &local) in copies.physical_to_logical.iter().enumerate() {
            let physical = node * replicas_per_node + gpus.pack[copy] * per_gpu + gpus.rank[copy];
            map.physical_to_logical[physical] = experts[local];
            map.logical_to_physical[experts[local]].push(physical);
            map.logical_count[experts[local]] += 1;
        }
    }
    Ok(map)
}

/// The first index of the largest value.
fn argmax(len: usize, value: impl Fn(usize) -> f32) -> usize {
    (1..len).fold(0, |best, at| if value(at) > value(best) { at } else { best })
}

fn check_weights(weight: &[f32]) -> Result<(), EplbError> {
    match weight.iter().position(|value| !value.is_finite() || *value < 0.0) {
        Some(index) => Err(EplbError::BadWeight { index, value: weight[index] }),
        None => Ok(()),
    }
}

fn divide(
    operation: &'static str,
    what: &'static str,
    value: usize,
    by: &'static str,
    divisor: usize,
) -> Result<usize, EplbError> {
    if value == 0 || divisor == 0 || !value.is_multiple_of(divisor) {
        return Err(EplbError::Indivisible { operation, what, value, by, divisor });
    }
    Ok(value / divisor)
}

/// What the published algorithm cannot plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EplbError {
    /// A count must be a positive multiple of another.
    #[error("{operation}: {value} {what} do not divide evenly over {divisor} {by}")]
    Indivisible {
        /// The function.
        operation: &'static str,
        /// What is divided.
        what: &'static str,
        /// How many there are.
        value: usize,
        /// Over what.
        by: &'static str,
        /// How many of those.
        divisor: usize,
    },
    /// Every expert needs one copy, and there must be an expert.
    #[error("replicate_experts: {replicas} replicas cannot hold {experts} experts")]
    TooFewReplicas {
        /// Physical experts.
        replicas: usize,
        /// Logical experts.
        experts: usize,
    },
    /// A weight is negative or not finite.
    #[error("eplb: weight {index} is {value}")]
    BadWeight {
        /// Its index.
        index: usize,
        /// The weight.
        value: f32,
    },
}
