// Reads a semantic model with Microsoft's own library and prints what it understood, one object a line.
using System;
using Microsoft.AnalysisServices.Tabular;

static class ReadModel
{
    static int Main(string[] arguments)
    {
        try
        {
            var model = TmdlSerializer.DeserializeDatabaseFromFolder(arguments[0]).Model;
            foreach (var table in model.Tables)
            {
                Console.WriteLine("table\t" + table.Name);
                foreach (var column in table.Columns) Console.WriteLine("column\t" + table.Name + "\t" + column.Name + "\t" + column.DataType);
                foreach (var measure in table.Measures) Console.WriteLine("measure\t" + table.Name + "\t" + measure.Name);
                if (table.RefreshPolicy != null) Console.WriteLine("policy\t" + table.Name);
            }
            foreach (var expression in model.Expressions) Console.WriteLine("expression\t" + expression.Name);
            foreach (var role in model.Roles) Console.WriteLine("role\t" + role.Name);
            foreach (var relationship in model.Relationships) Console.WriteLine("relationship\t" + relationship.FromTable.Name + "\t" + relationship.ToTable.Name);
            return 0;
        }
        catch (Exception error)
        {
            Console.Error.WriteLine(error.Message);
            return 1;
        }
    }
}
