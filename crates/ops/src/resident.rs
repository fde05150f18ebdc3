//! Steps, passes and routings of backends whose device is the host: the reference and the CPU.

use cadre_types::{PageId, Position, TokenId};

use crate::{
    check,
    error::OpsError,
    step::{AttentionForm, PassInfo, PassRows, RowGroup, StepInfo, StepRows, check_pass},
};

/// A step in host memory.
#[derive(Clone, Debug, Default)]
pub struct HostStep {
    info: StepInfo,
    capacity: usize,
    ids: Vec<TokenId>,
    positions: Vec<Position>,
    wanted: Vec<usize>,
    segments: Vec<Located>,
    tables: Vec<PageId>,
}

/// Where a segment's rows and pages lie.
#[derive(Clone, Copy, Debug)]
struct Located {
    form: AttentionForm,
    first_row: usize,
    rows: usize,
    first_position: Position,
    table: (usize, usize),
}

/// Rows of one segment.
#[derive(Clone, Copy, Debug)]
pub struct HostSegment<'a> {
    /// The form.
    pub form: AttentionForm,
    /// First row of the step.
    pub first_row: usize,
    /// Rows; at least 1.
    pub rows: usize,
    /// Position of the first row.
    pub first_position: Position,
    /// Pages of the sequence.
    pub block_table: &'a [PageId],
}

impl HostStep {
    /// Room for a step.
    pub fn new(rows: usize) -> Self {
        Self { capacity: rows, ..Self::default() }
    }

    /// Takes a step in.
    pub fn fill(&mut self, op: &'static str, step: &StepRows<'_>) -> Result<(), OpsError> {
        check::at_least(op, "row capacity of the step", self.capacity, step.ids.len())?;
        self.info = StepInfo::of(op, step)?;
        self.ids.clear();
        self.ids.extend_from_slice(step.ids);
        self.wanted.clear();
        self.wanted.extend(step.wanted.iter().map(|row| *row as usize));
        self.positions.clear();
        self.segments.clear();
        self.tables.clear();
        for segment in step.segments.iter().filter(|segment| segment.rows > 0) {
            let first_row = self.positions.len();
            let first = segment.first_position;
            self.positions.extend((first..).take(segment.rows));
            let start = self.tables.len();
            self.tables.extend_from_slice(segment.block_table);
            self.segments.push(Located {
                form: segment.form,
                first_row,
                rows: segment.rows,
                first_position: first,
                table: (start, self.tables.len()),
            });
        }
        Ok(())
    }

    /// Sizes and bounds.
    pub fn info(&self) -> &StepInfo {
        &self.info
    }

    /// One token per row.
    pub fn ids(&self) -> &[TokenId] {
        &self.ids
    }

    /// One position per row that attends.
    pub fn positions(&self) -> &[Position] {
        &self.positions
    }

    /// The wanted rows.
    pub fn wanted(&self) -> &[usize] {
        &self.wanted
    }

    /// The segments that have rows, in order.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = HostSegment<'_>> {
        self.segments.iter().map(|located| HostSegment {
            form: located.form,
            first_row: located.first_row,
            rows: located.rows,
            first_position: located.first_position,
            block_table: &self.tables[located.table.0..located.table.1],
        })
    }
}

/// A pass in host memory.
#[derive(Clone, Debug, Default)]
pub struct HostPass {
    info: PassInfo,
    capacity: usize,
    input: Vec<usize>,
    output: Vec<usize>,
    groups: Vec<RowGroup>,
}

impl HostPass {
    /// Room for a pass.
    pub fn new(pairs: usize) -> Self {
        Self { capacity: pairs, ..Self::default() }
    }

    /// Takes a pass in.
    pub fn fill(&mut self, op: &'static str, pass: &PassRows<'_>) -> Result<(), OpsError> {
        check::at_least(op, "pair capacity of the pass", self.capacity, pass.input.len())?;
        self.info = check_pass(op, pass)?;
        self.input.clear();
        self.input.extend(pass.input.iter().map(|row| *row as usize));
        self.output.clear();
        self.output.extend(pass.output.iter().map(|row| *row as usize));
        self.groups.clear();
        self.groups.extend_from_slice(pass.groups);
        Ok(())
    }

    /// Sizes and bounds.
    pub fn info(&self) -> &PassInfo {
        &self.info
    }

    /// Per pair its received row.
    pub fn input(&self) -> &[usize] {
        &self.input
    }

    /// Per pair its row of the results.
    pub fn output(&self) -> &[usize] {
        &self.output
    }

    /// The pairs by expert.
    pub fn groups(&self) -> &[RowGroup] {
        &self.groups
    }
}

/// Chosen experts in host memory.
#[derive(Clone, Debug)]
pub struct HostRouting {
    capacity: (usize, usize),
    rows: usize,
    topk_idx: Vec<u16>,
    topk_weights: Vec<f32>,
    failed: Option<OpsError>,
}

impl HostRouting {
    /// Room for the choices of rows.
    pub fn new(rows: usize, top_k: usize) -> Self {
        let (topk_idx, topk_weights) = (Vec::new(), Vec::new());
        Self { capacity: (rows, top_k), rows: 0, topk_idx, topk_weights, failed: None }
    }

    /// Takes choices row by row from `choose(row, ids, weights)`. What a row fails with is what [`Self::ids`]
    /// says, and not an error of this call: a device would not know yet.
    pub fn fill(
        &mut self,
        op: &'static str,
        rows: usize,
        top_k: usize,
        mut choose: impl FnMut(usize, &mut Vec<u16>, &mut Vec<f32>) -> Result<(), OpsError>,
    ) -> Result<(), OpsError> {
        check::routing(op, self.capacity, rows, top_k)?;
        self.rows = rows;
        self.topk_idx.clear();
        self.topk_weights.clear();
        self.failed =
            (0..rows).try_for_each(|row| choose(row, &mut self.topk_idx, &mut self.topk_weights)).err();
        Ok(())
    }

    /// Takes choices that were made elsewhere.
    pub fn write(&mut self, op: &'static str, ids: &[u16], weights: &[f32]) -> Result<(), OpsError> {
        let top_k = self.capacity.1;
        let rows = ids.len() / top_k.max(1);
        check::equal(op, "choices of whole rows", ids.len(), rows * top_k)?;
        check::equal(op, "weights", weights.len(), ids.len())?;
        check::routing(op, self.capacity, rows, top_k)?;
        self.rows = rows;
        self.topk_idx.clear();
        self.topk_idx.extend_from_slice(ids);
        self.topk_weights.clear();
        self.topk_weights.extend_from_slice(weights);
        self.failed = None;
        Ok(())
    }

    /// Rows of the last choice.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Experts per row.
    pub fn top_k(&self) -> usize {
        self.capacity.1
    }

    /// The choices.
    pub fn ids(&self) -> Result<&[u16], OpsError> {
        match &self.failed {
            None => Ok(&self.topk_idx),
            Some(error) => Err(error.clone()),
        }
    }

    /// Their weights.
    pub fn weights(&self) -> &[f32] {
        &self.topk_weights
    }
}
